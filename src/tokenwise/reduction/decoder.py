"""Reduction inside a decoder: hooks before its layers take tokens out, and its cache stores what is left of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.decoders import Decoder
from tokenwise.models.selective_kv import SelectiveLayer, hidden_value
from tokenwise.models.tap import AttentionCall, attention_inputs, listen
from tokenwise.policies.plans import Shape
from tokenwise.reduction.active import claim, conflict
from tokenwise.reduction.base import DecoderReducer, DecoderTokens
from tokenwise.signals.head import IGNORED


@dataclass
class Prompt:
    """The tokens of one prompt on their way through the layers.

    Args:
        real: which tokens of the batch are no padding, [batch, tokens], bool.
        candidates: which of them may go, [batch, tokens], bool.
        plans: candidates in each layer, for each row of the batch.
        counts: candidates that are left, for each row.
        index: places of the tokens that are left, [batch, left], int64; 0 where a shorter row is filled up.
        left: which of `index` are tokens, [batch, left], bool.
        memory: the method's own, following the tokens.
        states: of all tokens, as they were when they left; None while all are there.
        given: the attention mask as the layers are given it.
        mask: of the tokens that are left.
        hidden: they themselves, as they go into the layer that is running.
        layers: for each layer so far the tokens it worked on, a row's padding not counted, [batch] each.
        inside: the layer that is running; None outside of them.
    """

    real: Tensor
    candidates: Tensor
    plans: list[list[int]]
    counts: list[int]
    index: Tensor
    left: Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    given: Tensor | None = None
    mask: Tensor | None = None
    hidden: Tensor | None = None
    layers: list[Tensor] = field(default_factory=list)
    inside: int | None = None

    @property
    def reduced(self) -> bool:
        return self.states is not None

    def take(self, values: Tensor) -> Tensor:
        """Of `values` ([..., batch or 1, tokens, channels], all tokens) those of the tokens that are left."""
        batch, left = self.index.shape
        values = values.expand(*values.shape[:-3], batch, *values.shape[-2:])
        return values.gather(-2, self.index.unsqueeze(2).expand(*values.shape[:-2], left, values.shape[-1]))

    def shown(self) -> Tensor:
        """Which of all tokens are left, [batch, tokens], bool."""
        batch, tokens = self.real.shape
        flags = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=self.real.device)
        return flags.scatter_(1, self.index.masked_fill(~self.left, tokens), True)[:, :tokens]

    def put_back(self, hidden: Tensor) -> Tensor:
        """All tokens, [batch, tokens, channels]: those that are left as they are in `hidden`."""
        if self.states is None:
            return hidden
        tokens = self.real.shape[1]
        # What fills up shorter rows goes to a row that is cut off.
        index = self.index.masked_fill(~self.left, tokens).unsqueeze(2).expand_as(hidden)
        return nn.functional.pad(self.states, (0, 0, 0, 1)).scatter(1, index, hidden)[:, :tokens]


class DecoderReduction(Handle):
    """A decoder whose layers take tokens out of every prompt, until `undo`.

    What the model gives keeps its length: a token that left has the state with which it did. Token positions stay
    those of the prompt.

    Attributes:
        decoder: the decoder.
        method: the method.
        last: the last prompt; None before the first.
        stats: ``prompts``; of the last one ``candidates`` (of the whole batch), ``candidates_after`` (in the last
            layer), ``mean_share`` (of candidate x layer), ``macs_share`` (of the layers' multiply-accumulates), and
            ``cached_before`` and ``cached_after`` (tokens that a cache stores for a layer, as a mean over the layers).
        masked: do not take tokens out but hide them from attention: the reference to which the fast way is compared.
    """

    def __init__(self, decoder: Decoder, model: nn.Module, method: DecoderReducer, masked: bool = False):
        super().__init__()
        if decoder.images is None and not method.of_text:
            raise InputError(
                Problem(
                    "model",
                    f"{type(model).__name__} reads no images, which {type(method).__name__} is for.",
                    "For a model of text use a method such as fast_v or sp_atten_decoder.",
                )
            )
        other = conflict(decoder.module, "decoder")
        if other is not None:
            raise InputError(other)
        self.decoder = decoder
        self.method = method
        self.masked = masked
        self.last: Prompt | None = None
        self._prompt: Prompt | None = None
        self._labels: Tensor | None = None
        self._plans: dict[tuple[int, int], list[int]] = {}

        def hook(handle: Any) -> None:
            self.on_undo(handle.remove)

        if model is not decoder.module:
            hook(model.register_forward_pre_hook(self._read_labels, with_kwargs=True))
            hook(model.register_forward_hook(self._forget_labels, always_call=True))
        hook(decoder.module.register_forward_pre_hook(self._begin, with_kwargs=True))
        hook(decoder.module.register_forward_hook(self._end, always_call=True))
        for index, layer in enumerate(decoder.layers):
            hook(layer.register_forward_pre_hook(self._entering(index), with_kwargs=True))
            hook(layer.register_forward_hook(self._leaving(index)))
        watched = method.watched(len(decoder.layers))
        for index in watched.get("attention", ()):
            self.on_undo(listen(decoder.layers[index].self_attn, self._attention_seer(index)))
        for index in watched.get("branch", ()):
            for branch in (decoder.layers[index].self_attn, decoder.layers[index].mlp):
                hook(branch.register_forward_hook(self._branch_seer(index), with_kwargs=True))
        for index in watched.get("neurons", ()):
            down = getattr(decoder.layers[index].mlp, "down_proj", None)
            if not isinstance(down, nn.Module):
                self.undo()
                raise InputError(
                    Problem(
                        "model",
                        f"{type(decoder.layers[index].mlp).__name__} has no down_proj, whose input "
                        f"{type(method).__name__} reads.",
                        "Use another method, such as fast_v.",
                    )
                )
            hook(down.register_forward_pre_hook(self._neuron_seer(index)))
        self.on_undo(claim(decoder.module, "decoder"))

    @property
    def kept(self) -> list[Tensor]:
        """Of each row of the last prompt the candidates that the last layer worked on, counted from 0, [kept]; empty
        before the first prompt."""
        if self.last is None:
            return []
        number = (self.last.candidates.cumsum(1) - 1).gather(1, self.last.index)
        left = self.last.candidates.gather(1, self.last.index) & self.last.left
        return [row[shown] for row, shown in zip(number, left, strict=True)]

    def plan(self, candidates: int, tokens: int) -> list[int]:
        """Candidates in each layer when there are so many at the beginning, among as many tokens."""
        if (candidates, tokens) not in self._plans:
            counts = self.method.planned(candidates, self._shape(tokens))
            if candidates and any(count != candidates for count in counts[: max(self.decoder.deep, 1)]):
                raise InputError(
                    Problem(
                        type(self.method).__name__,
                        f"drops tokens before layer {max(self.decoder.deep, 1)}, up to which the model needs all.",
                        "Drop them in later layers.",
                    )
                )
            self._plans[candidates, tokens] = counts
        return self._plans[candidates, tokens]

    def _shape(self, tokens: int) -> Shape:
        decoder = self.decoder
        return Shape(tokens, len(decoder.layers), 0, decoder.width, decoder.hidden_width, True, decoder.key_width)

    def _read_labels(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._labels = options.get("labels")

    def _forget_labels(self, module: nn.Module, args: Any, output: Any) -> None:
        self._labels = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._prompt = None
        labels = self._labels
        ids = options.get("input_ids", args[0] if args else None)
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        self._check(module, options, cache, mask)
        images = self.decoder.images
        if cache is not None and cache.get_seq_length():
            # A placeholder that the model wrote itself stands for no image.
            written = ids is not None and ids.shape[1] == 1 and not (images and images.has_pixels(options))
            if images is not None and ids is not None and not written and bool(images.places(ids).any()):
                raise InputError(
                    Problem(
                        "input_ids",
                        "holds images behind tokens that are already in the cache.",
                        "Give the whole conversation at once, and no prefill_chunk_size.",
                    )
                )
            return
        tokens = ids if ids is not None else options.get("inputs_embeds")
        if tokens is None or (ids is None and images is not None):
            raise InputError(
                Problem("input_ids", "is missing, and with it where the images are.", "Give input_ids to the model.")
            )
        shape, device = tokens.shape[:2], tokens.device
        real = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if images is not None:
            assert ids is not None
            candidates = images.places(ids) & real
        else:
            place = real.long().cumsum(1)
            candidates = real & (place > 1) & (place < place[:, -1:])
        if labels is not None:
            if labels.shape != shape:
                raise InputError(
                    Problem(
                        "labels",
                        f"have the shape {tuple(labels.shape)} where the decoder reads {tuple(shape)} tokens.",
                        "Train with one reduction at a time.",
                    )
                )
            # A token that predicts a label stays, and so does one that is a label.
            predicts = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
            candidates = candidates & ~(predicts | (labels != IGNORED))
        counts = candidates.sum(1).tolist()
        plans = [self.plan(*row) for row in zip(counts, real.sum(1).tolist(), strict=True)]
        index = torch.arange(shape[1], device=device).expand(shape)
        self._prompt = Prompt(real, candidates, plans, counts, index, real)

    def _check(self, module: nn.Module, options: dict[str, Any], cache: Any, mask: Any) -> None:
        problems = []
        config = self.decoder.layers[0].self_attn.config
        for name in ("output_hidden_states", "output_attentions"):
            asked = options.get(name)
            if getattr(config, name, False) if asked is None else asked:
                message = "has a length of its own in every layer while tokens are taken out."
                problems.append(Problem(name, message, f"Set {name}=False, or use a method for the input."))
        if cache is not None and not (
            isinstance(cache, Cache)
            and all(type(layer) in (DynamicLayer, SelectiveLayer) for layer in cache.layers)
            and not getattr(cache, "offloading", False)
            and getattr(cache, "layer_class_to_replicate", None) in (None, DynamicLayer)
        ):
            message = f"is a {type(cache).__name__} that cannot store a different number of tokens in every layer."
            problems.append(Problem("past_key_values", message, "Use a DynamicCache, which is what generate does."))
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            message = "is prepared already, so that the padding in it cannot be told."
            problems.append(Problem("attention_mask", message, "Give one number for each token, [batch, tokens]."))
        if problems:
            raise InputError(problems)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt is None or len(prompt.layers) < len(self.decoder.layers):
            return
        self.last = prompt
        # The index stays, for drawings and checks; the states of all tokens need not.
        prompt.states = prompt.given = prompt.mask = None
        prompt.memory = {}
        layers = len(self.decoder.layers)
        whole = int(prompt.candidates.sum())
        tokens = prompt.real.sum(1)
        worked = torch.stack(prompt.layers)
        shape = self._shape(0)
        rows = worked.T.tolist()
        dense = sum(shape.macs([count] * layers, [count] * layers) for count in tokens.tolist())
        gone = int((tokens - worked).sum())
        self.stats.update(
            prompts=self.stats.get("prompts", 0) + 1,
            candidates=whole,
            candidates_after=sum(len(row) for row in self.kept),
            mean_share=1 - gone / (whole * layers) if whole else 1.0,
            macs_share=sum(shape.macs(row, row) for row in rows) / dense,
            cached_before=int(tokens.sum()),
            cached_after=int(worked.sum()) / layers,
        )

    def _entering(self, index: int) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if "hidden_states" in options:
                args, options = (options["hidden_states"], *args), dict(options)
                del options["hidden_states"]
            hidden, cache = args[0], options.get("past_key_values")
            prompt = self._prompt
            if prompt is None:
                return self._continue(index, hidden.shape[1], args, options, cache)
            if index == 0:
                prompt.given = options.get("attention_mask")
                self._check_mask(prompt.given)
                with torch.no_grad():
                    self.method.start(self._tokens(prompt, index, hidden, options))
            hidden = self._drop(prompt, index, hidden, options)
            prompt.inside = index
            prompt.hidden = self._left(prompt, hidden)
            prompt.layers.append(prompt.left.sum(1))
            if not prompt.reduced:
                return None
            if cache is not None:
                self._expect(prompt, index, cache)
            return (hidden, *args[1:]), self._options(prompt, options)

        return enter

    def _leaving(self, index: int) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            prompt = self._prompt
            if prompt is None:
                return None
            prompt.inside = prompt.hidden = None
            if index < len(self.decoder.layers) - 1 or not prompt.reduced or self.masked:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            whole = prompt.put_back(hidden)
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return leave

    def _continue(self, index: int, tokens: int, args: tuple[Any, ...], options: dict[str, Any], cache: Any) -> Any:
        layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        if not isinstance(layer, SelectiveLayer):
            return None
        return args, {**options, "attention_mask": layer.mask(options.get("attention_mask"), tokens)}

    def _check_mask(self, mask: Any) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            raise InputError(
                Problem(
                    "attention_mask",
                    f"reaches the layers as {type(mask).__name__}, which cannot follow the tokens.",
                    "Load the model with attn_implementation='sdpa' or 'eager'.",
                )
            )

    def _tokens(self, prompt: Prompt, index: int, hidden: Tensor, options: dict[str, Any]) -> DecoderTokens:
        """The tokens as the method sees them; `hidden` are those that are left."""

        def next_attention() -> AttentionCall:
            layer = self.decoder.layers[index]
            # In the masked way the options still hold all tokens.
            given = self._taken(prompt, options)
            names = ("position_embeddings", "position_ids", "attention_mask")
            given = {name: given[name] for name in names if name in given}
            return attention_inputs(layer.self_attn, layer.input_layernorm(hidden), **given)

        candidates = prompt.candidates.gather(1, prompt.index) & prompt.left
        layers = len(self.decoder.layers)
        return DecoderTokens(
            hidden, index, layers, prompt.index, prompt.left, candidates, next_attention, prompt.memory
        )

    def _left(self, prompt: Prompt, hidden: Tensor) -> Tensor:
        """The tokens that are left, which in the masked way are among all."""
        return prompt.take(hidden) if self.masked and prompt.reduced else hidden

    def _drop(self, prompt: Prompt, index: int, hidden: Tensor, options: dict[str, Any]) -> Tensor:
        """What goes into a layer: of the tokens that left the one before those that stay; in the masked way all."""
        wanted = [plan[index] for plan in prompt.plans]
        if all(count <= most for count, most in zip(prompt.counts, wanted, strict=True)):
            return hidden
        tokens = self._tokens(prompt, index, self._left(prompt, hidden), options)
        stay = self.method.choose(tokens, torch.tensor(wanted, device=hidden.device))
        stays = prompt.left & (stay.candidates | ~tokens.candidates)
        if bool((stays == prompt.left).all()):
            return hidden
        # Stable, so that what stays keeps its order; shorter rows are filled up in front.
        order = stays.long().argsort(dim=1, stable=True)[:, -int(stays.sum(1).max()) :]
        made = tokens.hidden if stay.hidden is None else stay.hidden
        if self.masked:
            prompt.states = hidden
            hidden = prompt.put_back(made)
        else:
            prompt.states = prompt.put_back(tokens.hidden)
            hidden = made.gather(1, order.unsqueeze(2).expand(-1, -1, made.shape[2]))
        prompt.counts = (stays & tokens.candidates).sum(1).tolist()
        prompt.left = stays.gather(1, order)
        prompt.index = prompt.index.gather(1, order).masked_fill(~prompt.left, 0)
        for name, values in prompt.memory.items():
            rows = order.view(*order.shape, *[1] * (values.dim() - 2))
            prompt.memory[name] = values.gather(1, rows.expand(*order.shape, *values.shape[2:]))
        prompt.mask = self._mask(prompt.given, prompt.index, prompt.left)
        return hidden

    def _mask(self, given: Tensor | None, index: Tensor, shown: Tensor) -> Tensor | None:
        """The mask among the tokens at `index`, [batch, tokens], of which those `shown` are seen by others."""
        whole = bool(shown.all())
        if given is None and whole:
            return None
        count = index.shape[1]
        if given is None and "flash" in self.decoder.layers[0].self_attn.config._attn_implementation:
            raise InputError(
                Problem(
                    "input_ids",
                    "has rows that keep different numbers of tokens, which flash attention takes no mask for.",
                    "Load the model with attn_implementation='sdpa', or read one row at a time.",
                )
            )
        if given is None:
            seen = torch.ones(count, count, dtype=torch.bool, device=index.device).tril().expand(len(index), 1, -1, -1)
        else:
            given = given.expand(len(index), *given.shape[1:])
            seen = given.gather(3, index[:, None, None].expand(-1, *given.shape[1:3], -1))
            seen = seen.gather(2, index[:, None, :, None].expand(-1, seen.shape[1], -1, count))
        if whole:
            return seen
        seen = seen.masked_fill(~shown[:, None, None], hidden_value(seen.dtype))
        # A row without anything to see is no number: what is hidden sees itself.
        itself = torch.eye(count, dtype=torch.bool, device=index.device) & ~shown[:, None, :, None]
        return seen.masked_fill(itself, True if seen.dtype == torch.bool else 0.0)

    def _options(self, prompt: Prompt, options: dict[str, Any]) -> dict[str, Any]:
        """What a layer is called with beside the tokens."""
        if not self.masked:
            return self._taken(prompt, options)
        batch, tokens = prompt.real.shape
        every = torch.arange(tokens, device=prompt.index.device).expand(batch, -1)
        return {**options, "attention_mask": self._mask(prompt.given, every, prompt.shown())}

    def _taken(self, prompt: Prompt, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a layer for the tokens that are left."""
        if not prompt.reduced:
            return options
        taken = {**options, "attention_mask": prompt.mask}
        if options.get("position_embeddings") is not None:
            given = options["position_embeddings"]
            # One complex tensor in DeepSeek-V2, cosine and sine elsewhere.
            single = isinstance(given, Tensor)
            taken["position_embeddings"] = prompt.take(given) if single else tuple(prompt.take(part) for part in given)
        if options.get("position_ids") is not None:
            taken["position_ids"] = prompt.take(options["position_ids"].unsqueeze(-1)).squeeze(-1)
        return taken

    def _expect(self, prompt: Prompt, index: int, cache: Any) -> None:
        """Tell the layer of the cache which tokens it is about to store."""
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        if not isinstance(cache.layers[index], SelectiveLayer):
            cache.layers[index] = SelectiveLayer()
        batch, tokens = prompt.real.shape
        positions, real = prompt.index, prompt.left
        if self.masked:
            positions = torch.arange(tokens, device=prompt.index.device).expand(batch, -1)
            real = prompt.shown()
        cache.layers[index].expect(positions, tokens, None if bool(real.all()) else real)

    def _attention_seer(self, index: int) -> Any:
        def see(call: AttentionCall) -> None:
            prompt = self._prompt
            if prompt is None or prompt.inside != index:
                return
            if self.masked and prompt.reduced:
                query, key, value = (prompt.take(part.transpose(1, 2).flatten(2)) for part in _parts(call))
                query, key, value = (
                    part.unflatten(2, (-1, width)).transpose(1, 2)
                    for part, width in zip((query, key, value), (each.shape[3] for each in _parts(call)), strict=True)
                )
                call = AttentionCall(
                    call.module,
                    query,
                    key,
                    value,
                    prompt.mask,
                    call.scaling,
                    causal=prompt.mask is None,
                    softcap=call.softcap,
                    sinks=call.sinks,
                )
            with torch.no_grad():
                self.method.see_attention(self._seen(prompt, index), call)

        return see

    def _branch_seer(self, index: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            prompt = self._prompt
            if prompt is None or prompt.inside != index:
                return
            before = args[0] if args else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            before, after = self._left(prompt, before), self._left(prompt, after)
            with torch.no_grad():
                self.method.see_branch(self._seen(prompt, index), before, after)

        return see

    def _neuron_seer(self, index: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            prompt = self._prompt
            if prompt is None or prompt.inside != index:
                return
            with torch.no_grad():
                self.method.see_neurons(self._seen(prompt, index), self._left(prompt, args[0]))

        return see

    def _seen(self, prompt: Prompt, index: int) -> DecoderTokens:
        assert prompt.hidden is not None
        return self._tokens(prompt, index, prompt.hidden, {})


def _parts(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    return call.query, call.key, call.value
