"""The attention tap: what a layer's attention sees, read on its way to whatever implementation the model has.

One attention module is sent to our function, which lets its listeners look and then calls the implementation that was
there: nothing is computed twice, no map of tokens x tokens is made, and without a key bias the outputs do not change by
a bit. transformers' attention interface is served, and what calls PyTorch's fused attention by itself, as timm does.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from tokenwise.errors import InputError, Problem
from tokenwise.models.patch import replace_attribute
from tokenwise.signals.attention import (
    Divisors,
    Shown,
    attention_columns,
    attention_rank,
    attention_rows,
    attention_scores,
    attention_softmax,
    received_of,
)
from tokenwise.signals.attention_diversity import attention_map

# What some models add to the scores and the reading does not know: relative positions.
_UNKNOWN_TERMS = ("position_bias",)


@dataclass
class AttentionCall:
    """One call of an attention function.

    Args:
        module: the attention module.
        query: [batch, heads, queries, head_dim], after rotary embedding and normalisation.
        key: [batch, key heads, keys, head_dim]; heads is a multiple of key heads.
        value: [batch, key heads, keys, value_dim].
        mask: what is added to the scores, or where they count: 4 dimensions that broadcast to
            [batch, heads, queries, keys]; None where there is none.
        scaling: factor on the scores.
        causal: whether a query sees no later key although `mask` is None.
        softcap: bound of the scores, or None.
        window: how many positions back a query sees although `mask` is None, or None.
        sinks: a further score of each head, [heads], that takes its share of every row of the softmax and of which
            nothing is read, as gpt-oss has it; neither scaled nor bounded. None where there is none.
        key_bias: set by listeners: added to the scores of each key, [batch, 1, 1, keys].
        answer: set by a listener: what the attention gives, [batch, queries, heads, value_dim]; nothing else is
            computed then.
        padding: which keys are padding and which not, [batch, keys], where the implementation is given that instead of
            a mask.
        after: what a listener wants called once the attention has been computed.
        scores, weights: set by `compute`: before and after the softmax.

    A listener may also replace `query`, `key`, `value` and `mask`: the attention is computed with what stands here in
    the end.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool = False
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
    key_bias: Tensor | None = None
    answer: Tensor | None = None
    padding: Tensor | None = None
    after: list[Callable[[], None]] = field(default_factory=list)
    scores: Tensor | None = None
    weights: Tensor | None = None

    def add_key_bias(self, bias: Tensor) -> None:
        """Add `bias` to the scores of each key, [batch, keys]; -inf hides a key."""
        bias = bias[:, None, None, :]
        self.key_bias = bias if self.key_bias is None else self.key_bias + bias

    def rows(self, positions: Tensor) -> Tensor:
        """The attention of some queries over all keys.

        Args:
            positions: of the queries, [rows] or [batch, rows], int64.

        Returns:
            [batch, heads, rows, keys], fp32. Each row sums to 1, with sinks to less.
        """
        return attention_rows(self.query, self.key, positions, self._bias, self.scaling, self.softcap, self.sinks)

    def columns(
        self, valid: Tensor | None = None, temperature: float = 1.0, divisors: Divisors | None = None
    ) -> Tensor:
        """The attention each key receives, as a mean over the queries.

        Args:
            valid: queries to take the mean over, [batch, queries], bool; all unless given.
            temperature: what the scores, and the sinks, are divided by.
            divisors: what the exponentials of the scores, as they are at temperature 1, are divided by; asked for a
                block at a time. Those of the sinks stay as they are.

        Returns:
            [batch, heads, keys], fp32, summing to 1 over the keys, with sinks to less.
        """
        if self.scores is not None and self.weights is not None:
            # Of a model in lower precision the weights are rounded.
            exact = self.weights.dtype == self.scores.dtype
            if exact and valid is None and temperature == 1 and divisors is None:
                return self.weights[:, :, 0]
            return received_of(self.scores, valid, temperature, divisors, self.sinks)
        return attention_columns(
            self.query,
            self.key,
            self._shown,
            self.scaling / temperature,
            None if self.softcap is None else self.softcap / temperature,
            valid,
            divisors,
            1 / temperature,
            None if self.sinks is None else self.sinks / temperature,
        )

    def compute(self) -> None:
        """Answer a call of one query here: its scores are computed once, for the model and for who reads it."""
        bias = None
        if self.mask is not None or self.window is not None or self.key_bias is not None:
            bias = self._bias(torch.zeros(1, 1, dtype=torch.long, device=self.query.device))
        self.scores = attention_scores(self.query, self.key, bias, self.scaling, self.softcap)
        sinks = None if self.sinks is None else self.sinks.view(-1, 1, 1)
        self.weights = attention_softmax(self.scores, sinks).to(self.value.dtype)
        grouped = self.weights.unflatten(1, (self.value.shape[1], -1)).squeeze(3)
        self.answer = (grouped @ self.value).flatten(1, 2).unsqueeze(1)

    def whole_map(self) -> Tensor:
        """All of the attention, with its gradient: [batch, heads, queries, keys], fp32. For training small models."""
        everywhere = torch.arange(self.query.shape[2], device=self.query.device).expand(self.query.shape[0], -1)
        return attention_map(self.query, self.key, self._bias(everywhere), self.scaling, self.softcap, self.sinks)

    def rank(self, steps: int, valid: Tensor | None = None) -> Tensor:
        """How important each token is when importance flows along the attention, as `attention_rank` has it.

        Args:
            steps: how often it flows.
            valid: queries it starts from, [batch, queries], bool; all unless given.

        Returns:
            [batch, heads, keys], fp32, summing to 1 over the keys, with sinks to less.
        """
        return attention_rank(self.query, self.key, self._bias, self.scaling, steps, self.softcap, valid, self.sinks)

    def _bias(self, positions: Tensor) -> Tensor | None:
        """What is added to the scores of the queries at `positions` ([batch or 1, rows]), or None."""
        bias = self.key_bias
        if self.mask is not None:
            mask = self.mask
            if mask.shape[2] > 1 and positions.shape[0] == 1:
                mask = mask[:, :, positions[0]]
            elif mask.shape[2] > 1:
                index = positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
                mask = mask.expand(positions.shape[0], -1, -1, -1).gather(2, index)
            mask = _additive(mask, self.query.dtype)
            bias = mask if bias is None else mask + bias
        elif self.causal or self.window is not None:
            keys = torch.arange(self.key.shape[2], device=positions.device)
            distance = positions.unsqueeze(2) - keys
            hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
            if self.window is not None:
                hidden = hidden | (distance >= self.window)
            seen = torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, float("-inf")).unsqueeze(1)
            bias = seen if bias is None else seen + bias
        return bias

    def _shown(self, positions: Tensor) -> Shown:
        """What the queries at `positions`, which follow each other, see."""
        keys = self.key.shape[2]
        if self.mask is None and self.causal and self.window is None and self.key_bias is None:
            # All see the keys before the first of them.
            start, end = int(positions[0]), min(int(positions[-1]) + 1, keys)
            ahead = torch.full((len(positions), end - start), float("-inf"), device=positions.device).triu_(1)
            return Shown(end, ahead[None, None], start)
        bias = self._bias(positions.unsqueeze(0))
        if bias is None or bias.shape[3] == 1:
            return Shown(keys, bias)
        end = keys
        if self.mask is not None:
            seen = (bias > torch.finfo(bias.dtype).min / 2).flatten(0, 2).any(0)
            end -= int(seen.flip(0).long().argmax())
        elif self.causal:
            end = min(int(positions[-1]) + 1, keys)
        return Shown(end, bias[..., :end])

    def biased_mask(self) -> Tensor | None:
        """The mask with the key bias added: what the attention function is to be called with."""
        if self.key_bias is None:
            return self.mask
        bias = self.key_bias.to(self.query.dtype)
        if self.mask is None:
            if not self.causal and self.window is None:
                return bias
            whole = self._bias(torch.arange(self.query.shape[2], device=bias.device).unsqueeze(0))
            assert whole is not None
            return whole.to(self.query.dtype)
        return _additive(self.mask, self.query.dtype) + bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


Listener = Callable[[AttentionCall], None]


@dataclass
class _Listening:
    listeners: list[Listener] = field(default_factory=list)
    undo: Callable[[], None] = lambda: None

    def tell(self, call: AttentionCall) -> None:
        for listener in tuple(self.listeners):
            listener(call)


_LISTENING: WeakKeyDictionary[nn.Module, _Listening] = WeakKeyDictionary()


def listen(module: nn.Module, listener: Listener) -> Callable[[], None]:
    """Call `listener` with every attention call of `module`, before the attention is computed.

    A listener may read rows or columns of the attention, and may add a key bias. Several share one patch; the last to
    go restores the module.

    Args:
        module: an attention module of transformers that its attention interface serves, or one that calls PyTorch's
            fused attention, as timm's do. The pass raises InputError where the module turns out to do neither.
        listener: what to call.

    Returns:
        The function that ends it.
    """
    listening = _LISTENING.get(module)
    if listening is None:
        listening = _Listening()
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            listening.undo = _listen_to_interface(module, listening)
        else:
            listening.undo = _listen_to_sdpa(module, listening)
        _LISTENING[module] = listening
    listening.listeners.append(listener)

    def stop() -> None:
        if listener in listening.listeners:
            listening.listeners.remove(listener)
            if not listening.listeners and _LISTENING.get(module) is listening:
                del _LISTENING[module]
                listening.undo()

    return stop


class _Seen(Exception):
    """Ends a call of an attention module once its queries and keys are made."""


@torch.no_grad()
def attention_inputs(module: nn.Module, *args: Any, **options: Any) -> AttentionCall:
    """What `module` would hand to its attention function if it were called so; the attention is not computed.

    Listeners hear nothing of it. Give no cache: it would be written to. Where the values have a projection of their
    own they are not computed either, and are zero.
    """
    seen: list[AttentionCall] = []

    def see(call: AttentionCall) -> None:
        seen.append(call)
        raise _Seen

    stop = listen(module, see)
    listening = _LISTENING[module]
    others, listening.listeners = listening.listeners, [see]
    projection: Any = getattr(module, "v_proj", None)
    restore = stop
    if isinstance(projection, nn.Linear):
        width = projection.out_features
        none = replace_attribute(
            projection, "forward", lambda given: given.new_zeros(()).expand(*given.shape[:-1], width)
        )

        def restore() -> None:
            none()
            stop()

    try:
        module(*args, **options)
    except _Seen:
        pass
    finally:
        listening.listeners = others
        restore()
    return seen[0]


def attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that serves `module` under `implementation`; eager attention lives in each model's own file."""
    for kind in type(module).__mro__:
        names = vars(sys.modules[kind.__module__])
        if "eager_attention_forward" in names:
            functions = names.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
            return functions.get_interface(implementation, names["eager_attention_forward"])
    return AttentionInterface().get_interface(implementation, None)  # type: ignore[arg-type]


def _listen_to_interface(module: Any, listening: _Listening) -> Callable[[], None]:
    implementation = module.config._attn_implementation
    plain = attention_function(module, implementation)

    def tapped(
        owner: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **options: Any
    ) -> Any:
        unknown = [name for name in _UNKNOWN_TERMS if options.get(name) is not None]
        if unknown or not (attention_mask is None or isinstance(attention_mask, Tensor)):
            what = ", ".join(unknown) or type(attention_mask).__name__
            fix = "Use a model without it" if unknown else "Load the model with attn_implementation='sdpa'"
            raise InputError(
                Problem(
                    "model",
                    f"the attention of {type(owner).__name__} has {what}, which reading it does not know.",
                    f"{fix}, or a method that does not listen to attention.",
                )
            )
        scaling = options.get("scaling")
        causal = options.get("is_causal")
        causal = getattr(owner, "is_causal", False) if causal is None else causal
        prepared = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        call = AttentionCall(
            owner,
            query,
            key,
            value,
            prepared,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=bool(causal) and prepared is None and query.shape[2] > 1,
            softcap=options.get("softcap"),
            window=options.get("sliding_window") if prepared is None else None,
            sinks=options.get("s_aux"),
            padding=attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None,
        )
        borders = options.get("cu_seq_lens_q")
        for part in [call] if borders is None else _parts(call, borders.tolist()):
            listening.tell(part)
            if part is not call and part.key_bias is not None:
                call.key_bias = part.key_bias
        if call.answer is not None:
            return _done(call, (call.answer, call.weights))
        if call.key_bias is not None or call.mask is not prepared:
            if borders is not None or (attention_mask is not None and prepared is None):
                raise InputError(
                    Problem(
                        "model",
                        f"attention {implementation!r} takes no bias of its keys.",
                        "Load the model with attn_implementation='sdpa'.",
                    )
                )
            attention_mask = call.biased_mask()
        if call.query is not query:
            # Fewer channels are not to change the factor on the scores.
            options["scaling"] = call.scaling
        return _done(call, plain(owner, call.query, call.key, call.value, attention_mask, *args, **options))

    # The module alone is sent to our function: the name in its own copy of the configuration. Masks are made by the
    # backbone, from the configuration that stays as it is.
    name = f"{implementation}_tapped_{id(module)}"
    config = copy.copy(module.config)
    config._attn_implementation_internal = name
    AttentionInterface.register(name, tapped)
    restore = replace_attribute(module, "config", config)

    def undo() -> None:
        restore()
        AttentionInterface._global_mapping.pop(name, None)

    return undo


def _done(call: AttentionCall, output: Any) -> Any:
    for action in call.after:
        action()
    # They may hold the call, and with it what listened to it.
    call.after.clear()
    return output


def _parts(call: AttentionCall, borders: list[int]) -> list[AttentionCall]:
    """One call for each of the sequences that stand behind each other, as flash attention is given them."""
    return [
        replace(call, **{name: getattr(call, name)[:, :, start:end] for name in ("query", "key", "value")})
        for start, end in itertools.pairwise(borders)
    ]


class _Intercept(TorchFunctionMode):
    """Shows the call of PyTorch's attention that is made while it is active."""

    def __init__(self, module: nn.Module, listening: _Listening):
        super().__init__()
        self.module = module
        self.listening = listening
        self.called = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        self.called = True
        options = _sdpa_options(*args, **(kwargs or {}))
        query, mask, scale = options["query"], options["attn_mask"], options["scale"]
        call = AttentionCall(
            self.module,
            query,
            options["key"],
            options["value"],
            None if mask is None else mask[(None,) * (4 - mask.dim())],
            query.shape[-1] ** -0.5 if scale is None else scale,
            causal=options["is_causal"],
        )
        self.listening.tell(call)
        if call.key_bias is not None:
            options["attn_mask"], options["is_causal"] = call.biased_mask(), False
        return _done(call, function(**options))


def _sdpa_options(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """The arguments of PyTorch's attention by name."""
    return dict(locals())


def _listen_to_sdpa(module: Any, listening: _Listening) -> Callable[[], None]:
    """What calls PyTorch's fused attention by itself, as timm does, is caught at that call."""
    not_fused = InputError(
        Problem(
            "model",
            f"{type(module).__name__} does not call PyTorch's fused attention.",
            "For timm, call timm.layers.set_fused_attn(True) before the model is made.",
        )
    )
    if not getattr(module, "fused_attn", True):
        raise not_fused
    plain = module.forward

    def tapped(*args: Any, **options: Any) -> Any:
        if not listening.listeners:
            return plain(*args, **options)
        with _Intercept(module, listening) as mode:
            output = plain(*args, **options)
        if not mode.called:
            raise not_fused
        return output

    return replace_attribute(module, "forward", tapped)
