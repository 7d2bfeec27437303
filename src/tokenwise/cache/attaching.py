"""How a cache hears a model: weakly, so that dropping the cache ends it."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn
from transformers.cache_utils import Cache

from tokenwise.method import Handle
from tokenwise.models.tap import AttentionCall, listen


class ListeningCache(Cache, Handle):
    """A cache that is told of the attention of a model's layers, and a handle that ends it."""

    layers: list[Any]
    works_in: ClassVar[tuple[str, ...]] = ()
    """The functions in which what the method looks at, scores, chooses and moves is done, for whoever times it."""

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)
        Handle.__init__(self)

    def attach(self, model: nn.Module, attentions: dict[int, nn.Module]) -> None:
        """Hear the attention modules, by the index of their layer, and passes of the model, until it is undone or
        dropped."""
        mine = weakref.ref(self)
        for index, attention in attentions.items():
            self.on_undo(listen(attention, _listener(mine, index)))
        # Its innermost module, which is called however the model is.
        whole: Any = model
        inner = whole.get_decoder() if hasattr(model, "get_decoder") else model
        self.on_undo(inner.register_forward_pre_hook(_beginner(mine), with_kwargs=True).remove)
        weakref.finalize(self, self._undos.close)

    @abstractmethod
    def begin(self, tokens: int) -> None:
        """Before a pass of so many tokens with this cache."""

    @abstractmethod
    def attended(self, index: int, call: AttentionCall) -> None:
        """Before the attention of a layer, whichever cache it reads."""


def _listener(cache: weakref.ref[ListeningCache], index: int) -> Any:
    def hear(call: AttentionCall) -> None:
        found = cache()
        if found is not None:
            found.attended(index, call)

    return hear


def _beginner(cache: weakref.ref[ListeningCache]) -> Any:
    # A hook that is removed while hooks are running is called once more, without the options.
    def begin(module: nn.Module, args: tuple[Any, ...], options: Any = None) -> None:
        found = cache()
        if found is not None and options is not None and any(value is found for value in (*args, *options.values())):
            given = [*args[:1], options.get("input_ids"), options.get("inputs_embeds")]
            found.begin(next((tokens.shape[1] for tokens in given if tokens is not None), 0))

    return begin
