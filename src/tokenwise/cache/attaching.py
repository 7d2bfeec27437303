"""How a cache hears a model: weakly, so that dropping the cache ends it."""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.tap import AttentionCall, listen


class ListeningCache(Cache, Handle):
    """A cache that is told of the attention of a model's layers, and a handle that ends it."""

    layers: list[Any]
    model: nn.Module
    method: Any
    masked: bool
    works_in: ClassVar[tuple[str, ...]] = ()
    """The functions in which what the method looks at, scores, chooses and moves is done, for whoever times it."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        Handle.__init__(self)
        self._heard: frozenset[int] = frozenset()
        # The layer that has stored new tokens, and whose attention has not been heard of yet.
        self._awaited: int | None = None
        self._inferring = False

    def attach(self, model: nn.Module, attentions: dict[int, nn.Module]) -> nn.Module:
        """Hear the attention modules, by the index of their layer, and passes of the model, until it is undone or
        dropped.

        Returns:
            The innermost module of the model, which is called however the model is.
        """
        mine = weakref.ref(self)
        for index, attention in attentions.items():
            self.on_undo(listen(attention, _listener(mine, index)))
        whole: Any = model
        inner: nn.Module = whole.get_decoder() if hasattr(model, "get_decoder") else model
        self.on_undo(inner.register_forward_pre_hook(_beginner(mine), with_kwargs=True).remove)
        self._heard = frozenset(attentions)
        weakref.finalize(self, self._undos.close)
        return inner

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **options: Any) -> Any:
        if layer_idx in self._heard:
            if self._awaited is not None:
                raise InputError(
                    Problem(
                        "past_key_values",
                        f"layer {self._awaited} stored keys in this cache, and its attention was not called with them: "
                        f"the cache was made for another model than the one it is passed to, or the attention of "
                        f"{type(self.model).__name__} changes its keys once they are stored.",
                        "Pass it to the model that it was made for; an attention must hand what past_key_values.update "
                        "returns to the function that transformers' AttentionInterface gives.",
                    )
                )
            rows = self.layers[layer_idx].rows
            if rows is not None and rows != key_states.shape[0]:
                raise InputError(
                    Problem(
                        "past_key_values",
                        f"stores tokens of {rows} rows, and {key_states.shape[0]} are to follow.",
                        "Go on with the rows it began with, or begin with a new cache.",
                    )
                )
            self._awaited = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **options)

    def undo(self) -> None:
        self._heard, self._awaited = frozenset(), None
        super().undo()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same tokens in memory of their own, for the same model."""
        make: Any = type(self)
        other: Self = make(self.model, self.method, self.masked)
        memo.update((id(module), module) for module in self.model.modules())
        mine = {name: value for name, value in vars(self).items() if name != "_undos"}
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(mine, memo))
        if not self._heard:
            other.undo()
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} listens to a model and cannot be pickled; copy.deepcopy copies it.")

    @abstractmethod
    def begin(self) -> None:
        """Before a pass with this cache: forget what only some layers have seen of one that broke off."""

    def admit(self, rows: int, tokens: int) -> None:
        """Before a pass of so many tokens of so many rows: raise InputError where it is known to be refused later."""

    @abstractmethod
    def attended(self, index: int, call: AttentionCall) -> None:
        """Before the attention of a layer to what this cache stores."""


def _listener(cache: weakref.ref[ListeningCache], index: int) -> Any:
    def hear(call: AttentionCall) -> None:
        found = cache()
        if found is not None and found.layers[index].gave(call.key):
            found._awaited = None
            found.attended(index, call)

    return hear


def _beginner(cache: weakref.ref[ListeningCache]) -> Any:
    # A hook that is removed while hooks are running is called once more, without the options.
    def begin(module: nn.Module, args: tuple[Any, ...], options: Any = None) -> None:
        found = cache()
        if found is not None and options is not None and any(value is found for value in (*args, *options.values())):
            given = [*args[:1], options.get("input_ids"), options.get("inputs_embeds")]
            shape = next((tokens.shape[:2] for tokens in given if tokens is not None), None)
            if shape is not None and shape[1] == 0:
                raise InputError(
                    Problem(
                        "input_ids",
                        f"brings no token beyond the {found.get_seq_length()} that the cache has seen.",
                        "Give generate the whole conversation, the new turn behind what was read; for another prompt "
                        "begin with a new cache, or reset() this one.",
                    )
                )
            inferring = torch.is_inference_mode_enabled()
            if found._inferring and not inferring:
                # What was stored in inference mode cannot be written to outside of it.
                found.layers = copy.deepcopy(found.layers)
            found._awaited, found._inferring = None, inferring
            found.begin()
            if shape is not None:
                found.admit(*shape)

    return begin
