"""Reduction inside an encoder: hooks around the sub-layers of its blocks, no forward of a model replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.encoders import Encoder, EncoderBlock
from tokenwise.models.patch import replace_attribute
from tokenwise.models.tap import AttentionCall, listen
from tokenwise.models.vision_language import LAYOUTS
from tokenwise.policies.plans import Shape
from tokenwise.reduction.active import claim, conflict
from tokenwise.reduction.base import EncoderReducer, LayerTokens
from tokenwise.reduction.merge import Merge, Mixture, take


@dataclass
class Pass:
    """The tokens of one forward pass on their way through the blocks.

    Args:
        counts: tokens after each block by the plan.
        size: of the tokens that are left, [batch, tokens], fp32.
        positions: where each of them stood at the beginning, [batch, tokens].
        padding: which are padding, [batch, tokens], bool; None where there is none.
        hidden: which were padding at the beginning; None where there was none.
        memory: the method's own, following the tokens.
        filled: whether a block left tokens that only fill up their row, as padding that no mask knows.
        reduced: whether any block took tokens out.
        layers: what was left after each block so far, for drawings and checks; the most in a row of the batch.
    """

    counts: list[int]
    size: Tensor
    positions: Tensor
    padding: Tensor | None = None
    hidden: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    filled: bool = False
    reduced: bool = False
    layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = self.positions.shape[1]
        """Tokens at the beginning."""
        self._group = self.positions
        self._changes: list[Merge | Mixture] = []

    @property
    def reduces(self) -> bool:
        """Whether the plan takes any token out."""
        return self.counts[-1] < self.tokens

    @property
    def group(self) -> Tensor:
        """Which token each one of the beginning is in, [batch, tokens at the beginning]; -1 where dropped.

        Followed only when it is asked for: few passes are looked at.
        """
        for change in self._changes:
            moved = change.moved()
            moved = nn.functional.pad(moved, (0, self.tokens - moved.shape[1]), value=-1)
            self._group = torch.where(self._group < 0, -1, moved.gather(1, self._group.clamp_min(0)))
        self._changes.clear()
        return self._group

    def follow(self, change: Merge | Mixture) -> None:
        """Let the bookkeeping follow a change of the tokens."""
        self.size = change.new_size(self.size)
        self._changes.append(change)
        self.positions = self.positions.gather(1, change.kept)
        if self.padding is not None:
            self.padding = self.padding.gather(1, change.kept)
        if isinstance(change, Merge) and change.fills:
            empty = self.size == 0
            self.padding = empty if self.padding is None else self.padding | empty
            self.filled = True
        for name, values in self.memory.items():
            index = change.kept.view(*change.kept.shape, *[1] * (values.dim() - 2))
            self.memory[name] = values.gather(1, index.expand(*change.kept.shape, *values.shape[2:]))
        self.reduced = True

    @property
    def empty(self) -> Tensor | None:
        """Places that hold nothing since rows of the batch keep different numbers, [batch, tokens], bool, or None."""
        return self.size == 0 if self.filled else None

    def key_bias(self, method: EncoderReducer) -> Tensor | None:
        """What the tokens that are left add to the scores of their keys, [batch, tokens], or None."""
        bias = self.size.log() if method.proportional and method.merges else None
        if self.filled:
            assert self.padding is not None
            bias = torch.zeros_like(self.size) if bias is None else bias
            bias = bias.masked_fill(self.padding, torch.finfo(bias.dtype).min)
        return bias


class EncoderReduction(Handle):
    """An encoder whose blocks take tokens out, until `undo`.

    Attributes:
        encoder: the encoder.
        method: the method.
        last: the last forward pass; None before the first.
        stats: ``passes``; of the last pass ``tokens_before``, ``tokens_after``, ``mean_share`` (of tokens that the
            feed-forward layers worked on) and ``macs_share`` (of the blocks' multiply-accumulates).
        masked: do not take tokens out but hide them from attention, and give each merged token all its members'
            places: the reference to which the fast way is compared.
        watch: called with the tokens of each block that takes some out, before it does; None unless set.
    """

    def __init__(self, encoder: Encoder, method: EncoderReducer, masked: bool = False, model: nn.Module | None = None):
        super().__init__()
        model = encoder.module if model is None else model
        self.encoder = encoder
        self.method = method
        self.masked = masked
        self.last: Pass | None = None
        self.watch: Callable[[LayerTokens], None] | None = None
        self._plans: dict[int, list[int]] = {}
        self._calls: dict[int, AttentionCall] = {}
        self._given: dict[str, Tensor] = {}
        self._collects: str | None = None
        self._reads_text = False
        check_encoder(encoder, method, masked, model)
        self.on_undo(claim(encoder.module, "encoder"))
        self.on_undo(model.register_forward_pre_hook(self._called, with_kwargs=True).remove)
        self.on_undo(model.register_forward_hook(self._answered, always_call=True).remove)
        for part in model.modules():
            # Parts that are called by themselves, as when features of images alone are wanted.
            if part is not model and encoder.module in part.modules() and hasattr(part, "config"):
                self._watch_part(part)
        whole, inner = cast(Any, model), cast(Any, encoder.module)
        if hasattr(inner, "forward_intermediates"):  # timm's, which calls the blocks itself
            collecting = self._collecting(inner.forward_intermediates)
            self.on_undo(replace_attribute(inner, "forward_intermediates", collecting))
        if _has_placeholders(model) and hasattr(whole, "generate"):
            # It encodes images before it calls the model.
            self.on_undo(replace_attribute(model, "generate", self._generating(whole.generate)))
        try:
            for index, block in enumerate(encoder.blocks):
                self._attach(index, block)
        except BaseException:
            self.undo()
            raise

    def plan(self, tokens: int) -> list[int]:
        """Tokens after each block when `tokens` come in."""
        if tokens not in self._plans:
            encoder = self.encoder
            shape = Shape(
                tokens, len(encoder.blocks), encoder.prefix, encoder.width, encoder.hidden_width, encoder.gated
            )
            counts = self.method.planned(shape)
            before = tokens
            for count in counts:
                if not encoder.prefix < count <= before and count != before:
                    raise InputError(
                        Problem(
                            f"{type(self.method).__name__}.keep",
                            f"leaves {count} of {before} tokens, of which {encoder.prefix} are protected.",
                            "Keep at least one token besides these.",
                        )
                    )
                before = count
            self._plans[tokens] = counts
        return self._plans[tokens]

    def _called(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Before the model's forward: take what is the method's, and see whether hidden states are asked for."""
        asked = options.get("output_hidden_states")
        if asked is None:
            asked = getattr(getattr(model, "config", None), "output_hidden_states", False)
        # A vision-language model means those of its language model.
        of_tower = bool(asked) and not hasattr(getattr(model, "model", model), "vision_tower")
        self._collects = "output_hidden_states" if of_tower else None
        self._reads_text = _has_placeholders(model)
        missing = [name for name in self.method.inputs if name not in options]
        if missing:
            name = type(self.method).__name__
            raise InputError(Problem(missing[0], f"is missing, which {name} needs.", "Give it to the model's call."))
        self._given = {name: options[name] for name in self.method.inputs}
        return args, {name: value for name, value in options.items() if name not in self._given}

    def _watch_part(self, part: nn.Module) -> None:
        asking: list[bool] = []

        def called(part: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            asked = options.get("output_hidden_states")
            asked = getattr(part.config, "output_hidden_states", False) if asked is None else asked
            asking.append(bool(asked) and self._collects is None)
            if asking[-1]:
                self._collects = "output_hidden_states"

        def answered(part: nn.Module, args: Any, output: Any) -> None:
            if asking and asking.pop():
                self._collects = None

        self.on_undo(part.register_forward_pre_hook(called, with_kwargs=True).remove)
        self.on_undo(part.register_forward_hook(answered, always_call=True).remove)

    def _answered(self, model: nn.Module, args: Any, output: Any) -> None:
        self._reads_text, self._collects = False, None

    def _collecting(self, collect: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collect)
        def collecting(*args: Any, **options: Any) -> Any:
            self._collects = "forward_intermediates"
            try:
                return collect(*args, **options)
            finally:
                self._collects = None

        return collecting

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def generating(*args: Any, **options: Any) -> Any:
            self._reads_text = True
            try:
                return generate(*args, **options)
            finally:
                self._reads_text = False

        return generating

    def _attach(self, index: int, block: EncoderBlock) -> None:
        def hook(handle: Any) -> None:
            self.on_undo(handle.remove)

        running: dict[str, Any] = {}

        def enter(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            running.clear()
            hidden = args[0] if args else options["hidden_states"]
            if index == 0:
                self._begin(hidden, _mask_of(args, options))
                self._check_pass(module)
            assert self.last is not None
            if not self.last.reduced:
                return None
            if options.get("rope") is not None:
                options = {**options, "rope": self._rope(options["rope"], self.last)}
            return (args, options) if self.masked else _with_mask(args, options, self.last)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            assert self.last is not None
            if "reduced" in running:
                result = running["reduced"] + running["branch"]
                output = (result, *output[1:]) if isinstance(output, tuple) else result
            if self.method.place == "after":
                hidden = output[0] if isinstance(output, tuple) else output
                reduced = self._reduce(index, hidden)
                if reduced is not None:
                    output = (reduced, *output[1:]) if isinstance(output, tuple) else reduced
            self.last.layers.append(self.last.positions.shape[1])
            self._calls.pop(index, None)
            if index == len(self.encoder.blocks) - 1:
                self._finish()
                empty = self.last.empty
                # A text's padding is read by its mask, or by `last.padding`; an image's head knows of none.
                if empty is not None and bool(empty.any()) and not (self.masked or self.encoder.is_text):
                    hidden = output[0] if isinstance(output, tuple) else output
                    filled = self._show_empty(hidden, empty)
                    output = (filled, *output[1:]) if isinstance(output, tuple) else filled
            return output

        def between(module: nn.Module, args: tuple[Any, ...]) -> Any:
            reduced = self._reduce(index, args[0])
            if reduced is None:
                return None
            running["reduced"] = reduced
            return (reduced, *args[1:])

        def in_branch(module: nn.Module, args: Any, output: Tensor) -> Any:
            if "reduced" not in running:
                return None
            running["branch"] = output
            # The block adds this to as many tokens as it began with; the sum is replaced as a whole.
            return output.new_zeros(()).expand(output.shape[0], 1, 1)

        def after_output(module: nn.Module, args: Any, output: Any) -> Any:
            reduced = self._reduce(index, output[0] if isinstance(output, tuple) else output)
            if reduced is None:
                return None
            return (reduced, *output[1:]) if isinstance(output, tuple) else reduced

        hook(block.module.register_forward_pre_hook(enter, with_kwargs=True))
        hook(block.module.register_forward_hook(leave))
        if self.method.place == "between":
            if block.output is not None:
                hook(block.output.register_forward_hook(after_output))
            else:
                assert block.norm is not None
                hook(block.norm.register_forward_pre_hook(between))
                hook(block.branch[-1].register_forward_hook(in_branch))
        # There may be places that attention must not see, or tokens that count as many.
        if self.masked or self.method.merges or self.method.ragged or "attention" in self.method.reads:
            self.on_undo(listen(block.attention, lambda call: self._listen(index, call)))

    def _begin(self, hidden: Tensor, mask: Tensor | None) -> None:
        batch, tokens = hidden.shape[:2]
        positions = torch.arange(tokens, device=hidden.device).expand(batch, -1)
        padding = None
        if mask is not None:
            shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            rows = shown.expand(batch, *shown.shape[1:])[:, 0]
            if rows.shape[1] > 1 and bool((rows != rows[:, :1]).any()):
                raise InputError(
                    Problem(
                        "attention_mask",
                        "differs between the tokens of a row, as packed texts' does.",
                        "Give each text a row of its own.",
                    )
                )
            padding = ~rows[:, 0]
            padding = padding if bool(padding.any()) else None
        if padding is not None and bool(padding[:, : self.encoder.prefix].any()):
            raise InputError(
                Problem(
                    "attention_mask",
                    f"hides one of the first {self.encoder.prefix} tokens, which must stay.",
                    "Pad on the right: tokenizer.padding_side = 'right'.",
                )
            )
        self._calls.clear()
        size = torch.ones(batch, tokens, device=hidden.device)
        for name, value in self._given.items():
            if value.shape[:2] != (batch, tokens):
                raise InputError(
                    Problem(name, f"has the shape {tuple(value.shape)}, but there are {batch} rows of {tokens} tokens.")
                )
        memory = {name: value.to(hidden.device) for name, value in self._given.items()}
        self.last = Pass(self.plan(tokens), size, positions, padding, padding, memory)

    def _check_pass(self, block: nn.Module) -> None:
        """Refuse what the pass asks for and a reduction cannot give, before the first block runs."""
        assert self.last is not None
        if not self.last.reduces:
            return
        if self._reads_text and not self.masked:
            raise InputError(
                Problem(
                    "model",
                    "has a placeholder for each token of its vision tower, of which "
                    f"{type(self.method).__name__} leaves fewer.",
                    "Use a method for the input or inside the language model, such as faster_vlm or fast_v, or reduce "
                    "with masked=True.",
                )
            )
        if self._collects is not None and not self.masked:
            raise InputError(
                Problem(
                    self._collects,
                    "asks for the tokens after every block, which are fewer after each.",
                    "Take those after the last block, or reduce with masked=True.",
                )
            )
        # Blocks of transformers checkpoint in training; timm's model does wherever there are gradients.
        for checkpoints, off in (
            (block.training and getattr(block, "gradient_checkpointing", False), "gradient_checkpointing_disable()"),
            (
                torch.is_grad_enabled() and getattr(self.encoder.module, "grad_checkpointing", False),
                "set_grad_checkpointing(False)",
            ),
        ):
            if checkpoints:
                message = "checkpoints gradients: its blocks run a second time, when the tokens are gone."
                raise InputError(Problem("model", message, f"Call model.{off} first."))

    def _listen(self, index: int, call: AttentionCall) -> None:
        assert self.last is not None
        tokens = self.last
        if "attention" in self.method.reads:
            self._calls[index] = call
        if not tokens.reduced:
            return
        if self.masked:
            call.add_key_bias(self._masked_bias(tokens))
        else:
            bias = tokens.key_bias(self.method)
            if bias is not None:
                call.add_key_bias(bias)

    def _rope(self, rope: Tensor, tokens: Pass) -> Tensor:
        """The rotary embedding of the places at which the tokens stand: a merged token stands where the one that
        took the others in stood.

        Args:
            rope: what timm gives its blocks, [tokens but the prefix, channels], with heads or batch and heads in front.
        """
        places = tokens.positions
        if self.masked:
            own = torch.arange(tokens.tokens, device=places.device)
            places = torch.where(tokens.group < 0, own, places.gather(1, tokens.group.clamp_min(0)))
        places = places[:, self.encoder.prefix :] - self.encoder.prefix
        rope = rope[(None,) * (4 - rope.dim())].expand(places.shape[0], -1, -1, -1)
        return rope.gather(2, places[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))

    def _masked_bias(self, tokens: Pass) -> Tensor:
        """What every place of the beginning adds to its scores: all members of a group together weigh what it does."""
        group = tokens.group.clamp_min(0)
        unseen = tokens.group < 0 if tokens.hidden is None else (tokens.group < 0) | tokens.hidden
        members = torch.zeros_like(tokens.size).scatter_add_(1, group, (~unseen).to(tokens.size)).clamp_min(1)
        bias = (tokens.size / members if self.method.proportional else 1 / members).log().gather(1, group)
        return bias.masked_fill(unseen, torch.finfo(bias.dtype).min)

    def _reduce(self, index: int, hidden: Tensor) -> Tensor | None:
        """The reduced tokens of one block, or None where it takes none out."""
        tokens = self.last
        assert tokens is not None
        count, available = tokens.counts[index], tokens.positions.shape[1]
        if not tokens.reduces or (count >= available and not self.method.sees_every_block):
            return None
        whole, call = hidden, self._calls.pop(index, None)
        if self.masked:
            hidden = take(hidden, tokens.positions)
            call = None if call is None else _compact_call(call, tokens, self.method)
        layer = LayerTokens(
            hidden,
            tokens.size,
            index,
            len(self.encoder.blocks),
            self.encoder.prefix,
            self.encoder.has_class_token,
            tokens.positions,
            call,
            tokens.padding,
            tokens.memory,
        )
        if self.method.sees_every_block:
            count = self.method.decide(layer, tokens.counts)
            if count >= available:
                return None
        if self.watch is not None:
            self.watch(layer)
        change = self.method.reduce(layer, count)
        if change is None:
            return None
        reduced = change.apply(hidden, tokens.size)
        tokens.follow(change)
        if not self.masked:
            return reduced
        members = take(reduced, tokens.group.clamp_min(0))
        return torch.where((tokens.group < 0).unsqueeze(2), whole, members)

    def _show_empty(self, hidden: Tensor, empty: Tensor) -> Tensor:
        """The tokens with NaN in the empty places: a model that reads more than the class token shows it."""
        if not self.encoder.has_class_token:
            raise InputError(
                Problem(
                    "batch",
                    f"{type(self.method).__name__} leaves different numbers of tokens in its images, and a model "
                    "without a class token may read the places between.",
                    "Pass one image at a time.",
                )
            )
        return hidden.masked_fill(empty.unsqueeze(2), float("nan"))

    def _finish(self) -> None:
        tokens = self.last
        assert tokens is not None
        encoder, before = self.encoder, tokens.tokens
        shape = Shape(before, len(encoder.blocks), encoder.prefix, encoder.width, encoder.hidden_width, encoder.gated)
        entered = [before, *tokens.layers[:-1]]
        processed = tokens.layers if self.method.place == "between" else entered
        dense = [before] * len(encoder.blocks)
        self.stats.update(
            passes=self.stats.get("passes", 0) + 1,
            tokens_before=before,
            tokens_after=tokens.layers[-1],
            mean_share=sum(processed) / sum(dense),
            macs_share=shape.macs(entered, processed) / shape.macs(dense, dense),
        )


def _compact_call(call: AttentionCall, tokens: Pass, method: EncoderReducer) -> AttentionCall:
    """The attention of the tokens that are left, as if the others were gone."""
    index = tokens.positions[:, None, :, None]

    def taken(values: Tensor) -> Tensor:
        return values.gather(2, index.expand(-1, values.shape[1], -1, values.shape[3]))

    mask = None if call.mask is None else _take_keys(call.mask, tokens.positions)
    compact = AttentionCall(
        call.module,
        taken(call.query),
        taken(call.key),
        taken(call.value),
        mask,
        call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
    )
    bias = tokens.key_bias(method) if tokens.reduced else None
    if bias is not None:
        compact.add_key_bias(bias)
    return compact


def _has_placeholders(model: nn.Module) -> bool:
    """Whether it is a vision-language model whose prompt has a token for each of an image's features."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) in LAYOUTS or any(
        getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index")
    )


_PER_TOKEN = (
    "Backbone",
    "ForDepthEstimation",
    "ForObjectDetection",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForPreTraining",
    "ForMaskedImageModeling",
    "ForSemanticSegmentation",
)


def check_encoder(encoder: Encoder, method: EncoderReducer, masked: bool, model: nn.Module) -> None:
    """Refuse a method that does not fit the encoder, or whose budget leaves nothing.

    Raises:
        InputError: with every problem.
    """
    name, problems = type(method).__name__, []
    other = conflict(encoder.module, "encoder")
    if other is not None:
        problems.append(other)
    if "class_token" in method.reads and not encoder.has_class_token:
        problems.append(
            Problem(
                "model",
                f"has no class token, which {name} reads.",
                "Use a method that reads the mean over all queries, such as zero_tprune, or none, such as tome.",
            )
        )
    if (
        isinstance(method.keep, str)
        and method.keep.endswith("tokens")
        and int(method.keep.split()[0]) <= encoder.prefix
    ):
        problems.append(
            Problem(
                f"{name}.keep",
                f"{method.keep!r} leaves none besides the {encoder.prefix} protected.",
                f"Write {encoder.prefix + 1} tokens or more, these included.",
            )
        )
    around = [type(part).__name__ for part in model.modules() if encoder.module in part.modules()]
    dense = next((kind for kind in around if kind.endswith(_PER_TOKEN)), None)
    if not masked and dense is not None:
        problems.append(
            Problem(
                "model",
                f"{dense} answers for every token, and tokens that go have no answer.",
                "Reduce a model that answers for the whole input, or use masked=True, which saves no compute.",
            )
        )
    if problems:
        raise InputError(problems)


def _mask_of(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor | None:
    mask = options.get("attention_mask", options.get("attn_mask", args[1] if len(args) > 1 else None))
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise InputError(
            Problem(
                "attention_mask",
                f"reaches the blocks as {type(mask).__name__}, which cannot follow the tokens.",
                "Load the model with attn_implementation='sdpa' or 'eager'.",
            )
        )
    return mask


def _with_mask(args: tuple[Any, ...], options: dict[str, Any], tokens: Pass) -> Any:
    """The block's inputs with the mask of the tokens that are left."""
    name = next((name for name in ("attention_mask", "attn_mask") if options.get(name) is not None), None)
    if name is not None:
        return args, {**options, name: _take_keys(options[name], tokens.positions)}
    if len(args) > 1 and args[1] is not None:
        return (args[0], _take_keys(args[1], tokens.positions), *args[2:]), options
    return args, options


def _take_keys(mask: Tensor, positions: Tensor) -> Tensor:
    mask = mask.expand(positions.shape[0], *mask.shape[1:])
    index = positions[:, None, None, :].expand(-1, *mask.shape[1:3], -1)
    taken = mask.gather(3, index)
    if taken.shape[2] == 1:
        return taken
    return taken.gather(2, positions[:, None, :, None].expand(-1, taken.shape[1], -1, positions.shape[1]))
