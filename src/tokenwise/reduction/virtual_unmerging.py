"""Virtual unmerging: a language model attends as if each merged image token still stood at all of its places.

Layers keep working on the merged tokens, and caches keep storing them. In attention alone every token that went into a
merged one is there again: with that one's query, key and value, turned to its own rotary position. What its members get
is averaged back into the merged token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.decoders import find_decoder
from tokenwise.models.rotary import Rotary, Turn, find_rotary
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.models.vision_language import VisionLanguageModel
from tokenwise.reduction.active import claim, conflict
from tokenwise.reduction.inputs import InputReduction, Pruned, whole_positions
from tokenwise.reduction.merge import Merge

_KINDS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Members:
    """The tokens of a sequence as they were before some were merged.

    Args:
        merged: the token that each one is in, [batch, members], int64.
        steps: positions that each one is behind that token (negative: before it), [batch, members], int64.
        shown: which are tokens and no padding, and were not dropped, [batch, members], bool.
        own: of each merged token the member whose place it has, [batch, tokens], int64; any for padding.
    """

    merged: Tensor
    steps: Tensor
    shown: Tensor
    own: Tensor

    def repeated(self, times: int) -> Members:
        """Each sequence so often, as beams have it."""
        return Members(*(part.repeat_interleave(times, 0) for part in (self.merged, self.steps, self.shown, self.own)))

    def followed(self, shown: Tensor) -> Members:
        """With further tokens behind, each of them alone; `shown` ([batch, further], bool): which are no padding."""
        batch, tokens = self.own.shape
        further = torch.arange(shown.shape[1], device=shown.device).expand(batch, -1)
        return Members(
            torch.cat([self.merged, tokens + further], 1),
            torch.cat([self.steps, torch.zeros_like(further)], 1),
            torch.cat([self.shown, shown], 1),
            torch.cat([self.own, self.merged.shape[1] + further], 1),
        )

    def spread(self, values: Tensor) -> Tensor:
        """One row for each member of `values` ([batch, heads, tokens, channels])."""
        index = self.merged[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return values.gather(2, index)

    def turn(self, rotary: Rotary) -> Turn:
        """From the position of its merged token to that of each member, for [batch, heads, members, head_dim]."""
        return rotary.by(self.steps.unsqueeze(1))

    def average(self, values: Tensor) -> Tensor:
        """The mean over the members of each merged token of `values` ([batch, members, channels])."""
        target = self.merged.masked_fill(~self.shown, -1)
        return Merge(self.own, target).apply(values, torch.ones_like(target))

    def visible(self, queries: int) -> Tensor | None:
        """Which members the last `queries` of them see, [batch, 1, queries, members], bool; None where a query sees all
        up to itself, and either all are queries or there is one."""
        members = self.shown.shape[1]
        if queries in (1, members) and bool(self.shown.all()):
            return None
        place = torch.arange(members, device=self.shown.device)
        asking = place[members - queries :, None]
        # A query that is padding sees itself, so that what it gives is a number.
        seen = (place < asking) & self.shown.unsqueeze(1) | (place == asking)
        return seen.unsqueeze(1)


def unmerged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    members: Members,
    turn: Turn,
    scaling: float,
    visible: Tensor | None,
) -> Tensor:
    """Causal attention over the members of merged tokens, averaged over those of each merged token.

    Args:
        query: [batch, heads, queries, head_dim], of all tokens, or of the last ones, each of which is alone.
        key: [batch, key heads, tokens, head_dim], turned to the position of each merged token, as is `query`.
        value: [batch, key heads, tokens, value_dim].
        members: of the tokens.
        turn: as `members.turn` gives it.
        scaling: factor on the scores.
        visible: as `members.visible` gives it for the members that ask.

    Returns:
        [batch, queries, heads, value_dim].
    """
    whole = query.shape[2] == key.shape[2]
    answer = functional.scaled_dot_product_attention(
        turn(members.spread(query)) if whole else query,
        turn(members.spread(key)),
        members.spread(value),
        attn_mask=visible,
        is_causal=whole and visible is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)
    return members.average(answer.flatten(2)).unflatten(2, answer.shape[2:]) if whole else answer


def members_of(layout: VisionLanguageModel, inputs: Mapping[str, Any], pruned: Pruned) -> Members | None:
    """The tokens of a batch, beside the shorter batch that was made of it.

    Args:
        layout: of the model.
        inputs: the batch as it was.
        pruned: what became of it, with the positions that its tokens had.

    Returns:
        The tokens; None where none was merged or dropped.
    """
    if pruned.index is None:
        return None
    ids, index = inputs["input_ids"], pruned.index
    batch, tokens = index.shape
    place = torch.arange(tokens, device=index.device).expand(batch, -1)
    # The number in the shorter batch of each token of the whole one; the padding of shorter rows is cut off.
    real = pruned.batch["attention_mask"].bool()
    merged = torch.full((batch, ids.shape[1] + 1), -1, device=ids.device)
    merged = merged.scatter_(1, index.masked_fill(~real, ids.shape[1]), place)[:, :-1].contiguous()
    for modality in layout.modalities:
        placeholders = layout.placeholders(ids, modality)
        groups = [
            (group.to(ids.device), kept.to(ids.device))
            for image, group, kept in zip(pruned.images, pruned.group, pruned.kept, strict=True)
            if image.modality == modality
        ]
        if groups:
            parts = merged[placeholders].split([len(group) for group, _ in groups])
            joined = [
                part[kept][group.clamp_min(0)].masked_fill(group < 0, -1)
                for part, (group, kept) in zip(parts, groups, strict=True)
            ]
            merged[placeholders] = torch.cat(joined)
    shown = merged >= 0
    merged = merged.clamp_min(0)
    positions = whole_positions(layout, inputs).expand(batch, -1)
    steps = positions - pruned.batch["position_ids"].gather(1, merged)
    return Members(merged, steps.masked_fill(~shown, 0), shown, index)


class VirtualUnmerging(Handle):
    """A language model that attends to merged image tokens as if all of them were there, until `undo`.

    Attributes:
        reduction: what merges them.
        stats: ``batches``, and over all of them ``tokens`` that the layers read and ``members`` that attention had.
    """

    def __init__(self, reduction: InputReduction):
        super().__init__()
        layout = reduction.layout
        problem = _problem(reduction)
        if problem is not None:
            raise InputError(problem)
        decoder = find_decoder(layout.model)
        other = conflict(decoder.module, "decoder")
        if other is not None:
            raise InputError(other)
        self.reduction = reduction
        self._rotary = find_rotary(
            _language_model(decoder.module),
            decoder.layers[0].self_attn,
            "model",
            "virtual unmerging turns keys to the positions of the members",
            "Leave virtual_unmerge out.",
        )
        self._attention = decoder.layers[0].self_attn
        self._of: tuple[ref[Pruned], Members | None] | None = None
        self._prompts: WeakKeyDictionary[Any, Members] = WeakKeyDictionary()
        self._prompt: Members | None = None
        self._members: Members | None = None
        self._turn: Turn | None = None
        self._visible: Tensor | None = None
        before = decoder.module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.on_undo(before.remove)
        self.on_undo(decoder.module.register_forward_hook(self._end, always_call=True).remove)
        for layer in decoder.layers:
            self.on_undo(listen(layer.self_attn, self._attend))
        self.on_undo(claim(decoder.module, "decoder"))
        reduction.on_undo(self.undo)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._prompt = self._members = self._turn = self._visible = None
        given = options.get("input_ids", args[0] if args else None)
        given = options.get("inputs_embeds") if given is None else given
        cache, mask = options.get("past_key_values"), options.get("attention_mask")
        past = 0 if cache is None else int(cache.get_seq_length())
        prompt = self._prompts.get(cache) if past else self._read()
        if prompt is None:
            return
        self._check(module, options)
        assert given is not None
        rows, read = given.shape[:2]
        batch, tokens = prompt.own.shape
        further = past + read - tokens
        if further < 0 or 0 < past < tokens or rows % batch:
            message = "is read in parts, or is not the one whose images were merged."
            raise InputError(Problem("input_ids", message, "Give each prompt at once, with no prefill_chunk_size."))
        self._prompt = prompt
        prompt = prompt.repeated(rows // batch)
        shown = torch.ones(rows, further, dtype=torch.bool, device=given.device)
        self._members = prompt.followed(shown if mask is None else mask[:, tokens:].bool())
        self._turn = self._members.turn(self._rotary)
        self._visible = self._members.visible(read if past else self._members.shown.shape[1])

    def _read(self) -> Members | None:
        """The members of the prompt that is being read; None where it has none, or none is read."""
        reading = self.reduction.reading
        if reading is None:
            return None
        inputs, pruned = reading
        if self._of is None or self._of[0]() is not pruned:
            members = members_of(self.reduction.layout, inputs, pruned)
            self._of = ref(pruned), members
            if members is not None:
                read = int(pruned.batch["attention_mask"].sum())
                for name, value in (("batches", 1), ("tokens", read), ("members", int(members.shown.sum()))):
                    self.stats[name] = self.stats.get(name, 0) + value
        return self._of[1]

    def _check(self, module: nn.Module, options: Mapping[str, Any]) -> None:
        problems = []
        config = self._attention.config
        asked = options.get("output_attentions")
        if getattr(config, "output_attentions", False) if asked is None else asked:
            message = "has rows that the layers do not have while tokens are virtually unmerged."
            problems.append(Problem("output_attentions", message, "Set output_attentions=False."))
        if not _plain(options.get("past_key_values")):
            message = f"is a {type(options['past_key_values']).__name__}, whose tokens cannot be told from each other."
            problems.append(Problem("past_key_values", message, "Use a DynamicCache, which is what generate does."))
        mask = options.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            message = "is prepared already, so that the padding in it cannot be told."
            problems.append(Problem("attention_mask", message, "Give one number for each token, [batch, tokens]."))
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            message = "checkpoints gradients: its layers run again when the prompt is no longer known."
            problems.append(Problem("model", message, "Call model.gradient_checkpointing_disable()."))
        if module.training and getattr(config, "attention_dropout", 0.0) > 0:
            message = "drops attention at random in training, which virtual unmerging does not."
            problems.append(Problem("model", message, "Set attention_dropout=0."))
        if problems:
            raise InputError(problems)

    def _attend(self, call: AttentionCall) -> None:
        members, turn = self._members, self._turn
        if members is None or turn is None:
            return
        if call.answer is not None or call.key_bias is not None or call.key.shape[2] != members.own.shape[1]:
            message = "is changed by something else, too, while tokens are virtually unmerged."
            raise InputError(Problem("attention", message, "Use one of both."))
        call.answer = unmerged_attention(call.query, call.key, call.value, members, turn, call.scaling, self._visible)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        prompt = self._prompt
        self._prompt = self._members = self._turn = self._visible = None
        cache = getattr(output, "past_key_values", None)
        if prompt is not None and isinstance(cache, Cache):
            self._prompts[cache] = prompt


def virtual_unmerge(reduction: Handle) -> VirtualUnmerging:
    """Let a language model attend to merged image tokens as if each still stood at all of its places, as DyMU does.

    Each token that was merged has the query, the key and the value of the merged one at its own position; what the
    members get is averaged. Everything else in the layers, and the cache, has the merged tokens alone: attention costs
    what it would without merging, the rest what it costs with it. Tokens that were dropped stay dropped. Where a method
    mixes tokens, each is a member of the one it weighs most in.

    Args:
        reduction: what `reduce` gave for a method that merges at the input; undoing it undoes this, too.

    Returns:
        A handle with `stats`.

    Raises:
        InputError: when the reduction is another or has ended, or the language model is not one of Llama, Mistral,
            Qwen2 and Qwen3 with positions in one line; in a pass, when it asks for attentions, checkpoints gradients,
            comes in parts or has another cache than a dynamic one.
    """
    if not isinstance(reduction, InputReduction):
        message = f"{type(reduction).__name__} merges nothing at the input of a language model."
        fix = "Give the handle of tokenwise.reduce(model, method) for a method at the site 'input'."
        raise InputError(Problem("reduction", message, fix))
    return VirtualUnmerging(reduction)


def _problem(reduction: InputReduction) -> Problem | None:
    """Why what a reduction merges cannot be unmerged; None where it can."""
    method, layout = reduction.method, reduction.layout
    if not method.merges:
        message = f"{type(method).__name__} drops tokens, and none of them can be unmerged."
        return Problem("reduction", message, "Use a method that merges, such as vq_token or vision_zip.")
    if conflict(layout.model, "input") is None:
        return Problem("reduction", "has ended.", "Call virtual_unmerge inside its with block.")
    if reduction.masked or reduction.positions != "original":
        what = "masked=True" if reduction.masked else "positions='compact'"
        message = f"has {what}, with which the tokens do not have the positions of their members."
        return Problem("reduction", message, "Leave it out.")
    kind = getattr(layout.config.get_text_config(), "model_type", None)
    if kind not in _KINDS:
        message = f"{type(layout.model).__name__} has a language model {kind!r}, whose attention is not known here."
        return Problem("model", message, f"Known are {', '.join(_KINDS)}.")
    return None


def _plain(cache: Any) -> bool:
    """Whether a cache, where there is one, stores every token of every layer as it comes."""
    return cache is None or (
        isinstance(cache, Cache)
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and not getattr(cache, "offloading", False)
        and getattr(cache, "layer_class_to_replicate", None) in (None, DynamicLayer)
    )


def _language_model(module: Any) -> nn.Module:
    """The part of a vision-language model that has the layers."""
    found: nn.Module | None = getattr(module, "language_model", None) or getattr(module, "text_model", None)
    return module if found is None else found
