"""Reduction at the input of a language model: features of images chosen, placeholders compacted with them."""

from __future__ import annotations

import bisect
import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.decoders import find_decoder
from tokenwise.models.patch import replace_attribute
from tokenwise.models.vision_language import (
    PROJECTOR_INPUTS,
    Encoded,
    EncodedImage,
    Modality,
    VisionLanguageModel,
    vision_language_model,
)
from tokenwise.policies.plans import Shape
from tokenwise.reduction.active import claim, conflict
from tokenwise.reduction.base import InputReducer
from tokenwise.reduction.merge import Merge, Mixture
from tokenwise.signals.head import IGNORED

Positions = Literal["original", "compact"]

_TOKEN_SHAPED = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


@dataclass
class Pruned:
    """A batch with fewer image tokens.

    Args:
        batch: what the model is to be called with.
        kept: rows of each image that stayed, in the order of the images.
        group: for each image and each of its rows the one of those that stayed it went into, or weighs most in; -1
            where it was dropped.
        before: image tokens of the whole batch before.
        after: image tokens of the whole batch after.
        images: what the method saw.
        index: the place in the whole batch of each token of the shorter one, [batch, tokens], int64, any where a row
            is filled up; None where all tokens stay.
    """

    batch: dict[str, Any]
    kept: list[Tensor]
    group: list[Tensor]
    before: int
    after: int
    images: list[EncodedImage]
    index: Tensor | None = None


def prune_inputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    method: InputReducer,
    *,
    positions: Positions = "original",
    padding: Literal["left", "right"] | None = None,
) -> dict[str, Any]:
    """A fresh batch in which each image has fewer tokens; the caller's batch is untouched.

    Args:
        model: a vision-language model.
        batch: its inputs, as its processor makes them; with labels where it is trained.
        method: chooses the tokens.
        positions: ``original`` leaves every token the position it had, so that dropping is the same as hiding;
            ``compact`` numbers the tokens that are left.
        padding: side on which shorter rows are filled up; as in the batch unless given, and left where it has none,
            right with labels.

    Returns:
        Inputs for the model's forward, or for one call of its generate (which changes the encoded images where it
        has several beams, and must have its cache): no pixels, the encoded images as ``mm_encoder_outputs``.

    Raises:
        InputError: when the model is not known, or placeholders and image features do not match.
    """
    return prune(vision_language_model(model), batch, method, positions=positions, padding=padding).batch


def prune(
    layout: VisionLanguageModel,
    batch: Mapping[str, Any],
    method: InputReducer,
    *,
    positions: Positions = "original",
    padding: Literal["left", "right"] | None = None,
    masked: bool = False,
) -> Pruned:
    """As `prune_inputs`, with what was kept; with `masked` all tokens stay, and those that would be gone are hidden."""
    inputs = dict(batch)
    check_layout(layout, method)
    check_batch(layout, inputs)
    input_ids = inputs["input_ids"]
    mixes_inputs = method.before_projector and layout.projector() is not None
    encoded = layout.encode(inputs, (*method.signals(), PROJECTOR_INPUTS) if mixes_inputs else method.signals())
    rows = [image.features.shape[0] for image in encoded.images]
    places = {modality: layout.placeholders(input_ids, modality) for modality in encoded.outputs}
    for modality, place in places.items():
        wanted = sum(len(image.features) for image in encoded.images if image.modality == modality)
        if int(place.sum()) != wanted:
            raise InputError(
                Problem(
                    "batch.input_ids",
                    f"has {int(place.sum())} placeholders for {wanted} {modality} features.",
                    "Make both with the model's own processor.",
                )
            )
    features, kept, deeper = [], [], []
    group: list[Tensor] = []
    for image, count in zip(encoded.images, _counts(layout, method, inputs, encoded, places), strict=True):
        if count >= image.features.shape[0]:
            features.append(image.features)
            deeper.append(image.deeper)
            kept.append(torch.arange(image.features.shape[0], device=image.features.device))
            group.append(kept[-1])
            continue
        if count < 1:
            raise InputError(
                Problem(f"{type(method).__name__}.keep", "leaves no token of an image.", "Keep at least one.")
            )
        change = method.select(image, count)
        features.append(
            _project_changed(image, change, masked) if mixes_inputs else _changed(image.features, change, masked)
        )
        deeper.append(tuple(_changed(values, change, masked) for values in image.deeper))
        kept.append(change.kept[0])
        group.append(_group(change, image.features.shape[0]))
    before, after = sum(rows), sum(part.shape[0] for part in kept)
    stays = torch.ones_like(input_ids, dtype=torch.bool)
    for modality, place in places.items():
        own = [
            (len(image.features), part)
            for image, part in zip(encoded.images, kept, strict=True)
            if image.modality == modality
        ]
        flags = [
            torch.zeros(count, dtype=torch.bool, device=place.device).index_fill_(0, part.to(place.device), True)
            for count, part in own
        ]
        stays[place] = torch.cat(flags)
    made = {name: value for name, value in inputs.items() if name not in encoded.used}
    index = None
    if not bool(stays.all()):
        if any(bool((place & ~_mask(inputs, place).bool()).any()) for place in places.values()):
            raise InputError(
                Problem("batch.attention_mask", "hides placeholders of images.", "Hide padding alone, or keep all.")
            )
        made = {name: value for name, value in made.items() if name not in layout.grids}
        if masked:
            made |= _hidden(layout, inputs, stays)
        else:
            shorter, index = _compacted(layout, inputs, stays, positions, padding)
            made |= shorter
    made["mm_encoder_outputs"] = layout.replace(encoded, features, deeper)
    return Pruned(made, kept, group, before, after, encoded.images, index)


def _counts(
    layout: VisionLanguageModel,
    method: InputReducer,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    places: Mapping[Modality, Tensor],
) -> list[int]:
    """Rows of each image that stay; where `keep` is a share of the operations, as many of each prompt's as fit."""
    if not (isinstance(method.keep, str) and method.keep.endswith("flops")):
        return method.counts_of(encoded.images)
    try:
        decoder = find_decoder(layout.model)
    except InputError as error:
        message = f"{method.keep!r} cannot be counted: {error.problems[0].message}"
        fix = 'Write the share of image tokens, such as 0.4, or "128 tokens".'
        raise InputError(Problem(f"{type(method).__name__}.keep", message, fix)) from None
    shape = Shape(0, len(decoder.layers), 0, decoder.width, decoder.hidden_width, True, decoder.key_width)
    lengths = _mask(inputs, inputs["input_ids"]).bool().sum(1).tolist()
    counts = [0] * len(encoded.images)
    for length, own in zip(lengths, _images_of_rows(encoded, places), strict=True):
        if own:
            found = _fit(method, [encoded.images[index] for index in own], length, shape)
            for index, count in zip(own, found, strict=True):
                counts[index] = count
    return counts


def _fit(method: InputReducer, images: list[EncodedImage], length: int, shape: Shape) -> list[int]:
    """The most rows of one prompt's images with which its operations are the share that `keep` says.

    Args:
        length: tokens of the prompt, those of the images among them.
        shape: of the language model's layers.
    """
    whole = sum(len(image.features) for image in images)

    def counts(total: int) -> list[int]:
        return method.replace(keep=total / whole).counts_of(images)

    def cost(total: int) -> float:
        tokens = [length - whole + sum(counts(total))] * shape.layers
        return float(shape.macs(tokens, tokens) / shape.macs([length] * shape.layers, [length] * shape.layers))

    # More tokens never cost less.
    most = bisect.bisect_right(range(1, whole + 1), float(str(method.keep).split()[0]), key=cost)
    if not most:
        message = f"{method.keep!r} is less than the share of {cost(1):.3f} that the text and one token of each "
        message += "image take."
        raise InputError(Problem(f"{type(method).__name__}.keep", message, "Keep more."))
    return counts(most)


def _images_of_rows(encoded: Encoded, places: Mapping[Modality, Tensor]) -> list[list[int]]:
    """The images whose placeholders each row of the batch has."""
    rows: list[list[int]] = [[] for _ in range(len(next(iter(places.values()))))]
    for modality, place in places.items():
        ends = place.sum(1).cumsum(0).tolist()
        taken = 0
        for index, image in enumerate(encoded.images):
            if image.modality == modality:
                rows[bisect.bisect_right(ends, taken)].append(index)
                taken += len(image.features)
    return rows


def _group(change: Merge | Mixture, rows: int) -> Tensor:
    """The output row that each of an image's rows is in, [rows], int64; -1 where it is in none."""
    if isinstance(change, Mixture):
        weight, found = change.mixing[0].abs().max(0)
        return found.masked_fill(weight == 0, -1)
    moved = change.moved()[0]
    return torch.nn.functional.pad(moved, (0, rows - moved.shape[0]), value=-1)


def _changed(values: Tensor, change: Merge | Mixture, masked: bool) -> Tensor:
    """The rows `values` after a change; with `masked` all of them, those that stay changed where they stand."""
    size = torch.ones(1, values.shape[0], device=values.device)
    changed = change.apply(values.unsqueeze(0), size)[0]
    return values.index_copy(0, change.kept[0], changed) if masked else changed


def check_batch(layout: VisionLanguageModel, batch: Mapping[str, Any]) -> None:
    """Refuse a batch whose tokens cannot be told from placeholders, or that goes on from a cache."""
    if batch.get("input_ids") is None:
        embedded = batch.get("inputs_embeds") is not None
        message = "is missing; in inputs_embeds placeholders cannot be told apart." if embedded else "is missing."
        fix = "Give token ids with a placeholder for each image feature."
        raise InputError(Problem("batch.input_ids", message, fix))
    mask = batch.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape):
        raise InputError(
            Problem("batch.attention_mask", "is not of the shape of input_ids.", "Give one number for each token.")
        )
    given = batch.get("position_ids")
    if mask is None and given is not None and given.dim() == 2 and bool((given.diff(dim=-1) != 1).any()):
        raise InputError(
            Problem(
                "batch.position_ids",
                "begin anew within a row, as those of packed sequences, which image tokens cannot be taken out of.",
                "Give each sequence a row, or an attention_mask.",
            )
        )
    if _length(batch.get("past_key_values")):
        raise InputError(
            Problem(
                "batch.past_key_values",
                "holds tokens already; images are reduced where a conversation begins.",
                "Give the whole conversation without a cache.",
            )
        )
    layout.check(batch)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _project_changed(image: EncodedImage, change: Merge | Mixture, masked: bool) -> Tensor:
    """Features of what `change` makes of the projector's inputs; rows that are no patches are passed on."""
    assert image.projector is not None
    inputs = image.signals[PROJECTOR_INPUTS].masked_fill(~image.patch.unsqueeze(1), 0)
    made = image.projector(_changed(inputs, change, False))
    kept = change.kept[0]
    changed = torch.where(image.patch[kept].unsqueeze(1), made, image.features[kept])
    return image.features.index_copy(0, kept, changed) if masked else changed


def check_layout(layout: VisionLanguageModel, method: InputReducer) -> None:
    """Refuse a method that reads what the vision tower does not have."""
    if "class_token" in method.reads and not layout.has_class_token():
        raise InputError(
            Problem(
                "model",
                f"the vision tower of {type(layout.model).__name__} has no class token, which {type(method).__name__} "
                "reads.",
                "Use a method that reads the mean over all queries (hi_prune) or the features alone (div_prune).",
            )
        )
    if "projector" in method.reads and layout.projector() is None:
        raise InputError(
            Problem(
                "model",
                f"{type(layout.model).__name__} has no projector that reads each patch by itself, as "
                f"{type(method).__name__} needs it.",
                "Use a method that reads the features alone (div_prune).",
            )
        )


def _compacted(
    layout: VisionLanguageModel,
    inputs: Mapping[str, Any],
    stays: Tensor,
    positions: Positions,
    padding: Literal["left", "right"] | None,
) -> tuple[dict[str, Any], Tensor]:
    """The token-shaped inputs without the tokens that go, and explicit positions and mask; the places they had."""
    mask = _mask(inputs, stays)
    padded = ~mask.bool()
    if padding is None:
        if bool(padded.any()):
            padding = "left" if bool(padded[:, 0].any()) else "right"
        else:
            padding = "right" if inputs.get("labels") is not None else "left"
    # Padding goes first, and comes back as far as the longest row needs it.
    stays = stays & mask.bool()
    longest = int(stays.sum(1).max())
    index = stays.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    real = torch.arange(longest, device=stays.device) < stays.sum(1, keepdim=True)
    if padding == "left":
        shift = (longest - stays.sum(1, keepdim=True) + torch.arange(longest, device=stays.device)) % longest
        order = torch.argsort(shift, dim=1, stable=True)
        index, real = index.gather(1, order), real.gather(1, order)
    made: dict[str, Any] = {}
    for name in _TOKEN_SHAPED:
        values = inputs.get(name)
        if isinstance(values, Tensor):
            taken = values.gather(1, index.to(values.device))
            fill = IGNORED if name == "labels" else 0
            if name == "input_ids":
                fill = _padding_id(layout)
            made[name] = taken.masked_fill(~real.to(values.device), fill)
    made["attention_mask"] = real.to(mask.dtype)
    whole = _positions(layout, inputs, mask)
    if positions == "compact":
        if whole.dim() > 2:
            raise InputError(
                Problem(
                    "positions",
                    "'compact' numbers tokens in one line; this model has positions in time and space.",
                    "Use 'original'.",
                )
            )
        made["position_ids"] = (made["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
    else:
        made["position_ids"] = whole.gather(-1, index.expand(*whole.shape[:-1], longest).to(whole.device))
    return made, index


def _hidden(layout: VisionLanguageModel, inputs: Mapping[str, Any], stays: Tensor) -> dict[str, Any]:
    """The whole token-shaped inputs, the tokens that would be gone hidden from all others."""
    mask = _mask(inputs, stays)
    made: dict[str, Any] = {
        "attention_mask": mask.masked_fill(~stays, 0),
        "position_ids": _positions(layout, inputs, mask),
    }
    if inputs.get("labels") is not None:
        made["labels"] = inputs["labels"].masked_fill(~stays, IGNORED)
    return made


def _mask(inputs: Mapping[str, Any], stays: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(stays, dtype=torch.long) if mask is None else mask


def _positions(layout: VisionLanguageModel, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
    given: Tensor | None = inputs.get("position_ids")
    return layout.position_ids(inputs, mask) if given is None else given


def whole_positions(layout: VisionLanguageModel, inputs: Mapping[str, Any]) -> Tensor:
    """The positions of a batch as it was, [batch or 1, tokens], or [axes, batch, tokens]."""
    return _positions(layout, inputs, _mask(inputs, inputs["input_ids"]))


def _padding_id(layout: VisionLanguageModel) -> int:
    config = layout.config.get_text_config()
    found = getattr(config, "pad_token_id", None)
    return 0 if found is None or found < 0 else int(found)


@torch.no_grad()
def verify_inputs(model: nn.Module, batch: Mapping[str, Any], method: InputReducer) -> float:
    """How far the reduced model is from the dense one in which the tokens that go are hidden.

    Args:
        model: a vision-language model in evaluation mode.
        batch: its inputs, as its processor makes them.
        method: chooses the tokens.

    Returns:
        The largest absolute difference of the logits of a token that stays: rounding, where all is well.

    Raises:
        InputError: as `prune_inputs`, and for a model in training mode, whose dropout would be measured.
    """
    if model.training:
        raise InputError(Problem("model", "is in training mode.", "Call model.eval() before."))
    layout = vision_language_model(model)
    batches = [prune(layout, batch, method, masked=masked).batch for masked in (False, True)]
    found, expected = (_real_logits(model, inputs) for inputs in batches)
    return float((found - expected).abs().max())


def _real_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits of what is not hidden, [tokens, vocabulary], fp32."""
    mask = batch.get("attention_mask")
    logits: Tensor = model(**batch).logits
    return (logits.flatten(0, 1) if mask is None else logits[mask.bool()]).float()


class InputReduction(Handle):
    """A vision-language model that reads fewer image tokens, until `undo`.

    Attributes:
        layout: the model's layout.
        method: the method.
        stats: ``batches``, and over all of them ``image_tokens_before`` and ``image_tokens_after``.
        kept: rows of each image that stayed, of the last batch; videos after images.
        group: for each of its rows the one of those that stayed it went into, as in `Pruned`.
        reading: the batch that is being read, and what became of it; None between batches.
    """

    def __init__(self, model: Any, method: InputReducer, positions: Positions = "original", *, masked: bool = False):
        super().__init__()
        layout = vision_language_model(model)
        check_layout(layout, method)
        other = conflict(model, "input")
        if other is not None:
            raise InputError(other)
        self.layout, self.method = layout, method
        self.positions, self.masked = positions, masked
        self.kept: list[Tensor] = []
        self.group: list[Tensor] = []
        self.reading: tuple[Mapping[str, Any], Pruned] | None = None
        forward, generate = model.forward, model.generate
        signature = inspect.signature(forward)
        # Caches that hold fewer tokens than the ids they were made from.
        shortened: WeakSet[Any] = WeakSet()

        def pruned(inputs: dict[str, Any], padding: Literal["left", "right"] | None = None) -> Pruned:
            found = prune(layout, inputs, self.method, positions=positions, padding=padding, masked=masked)
            self.kept, self.group = found.kept, found.group
            for name, value in (("batches", 1), ("image_tokens_before", found.before)):
                self.stats[name] = self.stats.get(name, 0) + value
            self.stats["image_tokens_after"] = self.stats.get("image_tokens_after", 0) + found.after
            return found

        @contextmanager
        def reading(inputs: Mapping[str, Any], found: Pruned) -> Iterator[None]:
            self.reading = inputs, found
            try:
                yield
            finally:
                self.reading = None

        def remember(output: Any, found: Pruned) -> None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None and found.after < found.before:
                shortened.add(cache)

        def refuse_shortened(cache: Any) -> None:
            if cache is not None and cache in shortened:
                raise InputError(
                    Problem(
                        "past_key_values",
                        "comes from a call with fewer tokens than its ids had.",
                        "Give the whole conversation without a cache; or, to forward, position_ids of the new tokens.",
                    )
                )

        @functools.wraps(forward)
        def reduced_forward(*args: Any, **inputs: Any) -> Any:
            inputs = {**signature.bind_partial(*args).arguments, **inputs}
            if layout.has_pixels(inputs):
                found = pruned(inputs)
                with reading(inputs, found):
                    output = forward(**found.batch)
                remember(output, found)
                return output
            if inputs.get("position_ids") is None:
                refuse_shortened(inputs.get("past_key_values"))
            elif _lacks_mask(inputs):
                # As in generation without a cache: gaps of positions would be taken for borders of packed sequences.
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            return forward(**inputs)

        @functools.wraps(generate)
        def reduced_generate(inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
            refuse_shortened(options.get("past_key_values"))
            if not layout.has_pixels(options):
                return generate(inputs, *args, **options)
            if inputs is not None:
                options["input_ids"] = inputs
            whole = options.get("input_ids")
            made = pruned(options, "left")
            given, options = options, made.batch
            assert whole is not None
            short = options["input_ids"].shape[1]
            _shorten(options, whole.shape[1] - short)
            with reading(given, made):
                found = generate(None, *args, **options)
            remember(found, made)
            sequences = found if isinstance(found, Tensor) else found.sequences
            times = sequences.shape[0] // whole.shape[0]
            prompt = whole.repeat_interleave(times, dim=0).to(sequences.device)
            sequences = torch.cat([prompt, sequences[:, short:]], dim=1)
            if isinstance(found, Tensor):
                return sequences
            found.sequences = sequences
            return found

        self.on_undo(claim(model, "input"))
        self.on_undo(layout.keep_state())
        self.on_undo(replace_attribute(model, "forward", reduced_forward))
        self.on_undo(replace_attribute(model, "generate", reduced_generate))


def _lacks_mask(inputs: Mapping[str, Any]) -> bool:
    """Whether encoded images are given without a mask and a cache."""
    given = [inputs.get(name) is not None for name in ("attention_mask", "past_key_values")]
    return inputs.get("mm_encoder_outputs") is not None and inputs.get("input_ids") is not None and not any(given)


def _shorten(options: dict[str, Any], fewer: int) -> None:
    """Lengths that count the prompt, for a prompt with `fewer` tokens."""
    config = copy.copy(options.get("generation_config"))
    for name in ("max_length", "min_length"):
        if options.get(name) is not None:
            options[name] -= fewer
        if getattr(config, name, None):
            setattr(config, name, max(getattr(config, name) - fewer, 0))
    if config is not None:
        options["generation_config"] = config
