"""Reduction at the input of a language model: features of images chosen, placeholders compacted with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.patch import replace_attribute
from tokenwise.models.vision_language import PROJECTOR_INPUTS, EncodedImage, VisionLanguageModel, vision_language_model
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
        before: image tokens of the whole batch before.
        after: image tokens of the whole batch after.
    """

    batch: dict[str, Any]
    kept: list[Tensor]
    before: int
    after: int


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
        Inputs for the model's forward or generate: no pixels, the encoded images as ``mm_encoder_outputs``.

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
) -> Pruned:
    """As `prune_inputs`, with what was kept."""
    inputs = dict(batch)
    check_layout(layout, method)
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        raise InputError(
            Problem("batch.input_ids", "is missing.", "Give token ids with a placeholder for each image feature.")
        )
    mixes_inputs = method.before_projector and layout.projector() is not None
    encoded = layout.encode(inputs, (*method.signals(), PROJECTOR_INPUTS) if mixes_inputs else method.signals())
    place = layout.placeholders(input_ids)
    rows = [image.features.shape[0] for image in encoded.images]
    if int(place.sum()) != sum(rows):
        raise InputError(
            Problem(
                "batch.input_ids",
                f"has {int(place.sum())} placeholders for {sum(rows)} image features.",
                "Make both with the model's own processor.",
            )
        )
    features, kept = [], []
    for image, count in zip(encoded.images, method.counts_of(encoded.images), strict=True):
        if count >= image.features.shape[0]:
            features.append(image.features)
            kept.append(torch.arange(image.features.shape[0], device=image.features.device))
            continue
        if count < 1:
            raise InputError(
                Problem(f"{type(method).__name__}.keep", "leaves no token of an image.", "Keep at least one.")
            )
        change = method.select(image, count)
        features.append(_project_changed(image, change) if mixes_inputs else _changed(image.features, change))
        kept.append(change.kept[0])
    before, after = sum(rows), sum(part.shape[0] for part in kept)
    stays = ~place
    flags = torch.zeros(before, dtype=torch.bool, device=place.device)
    start = 0
    for count, part in zip(rows, kept, strict=True):
        flags[start + part.to(flags.device)] = True
        start += count
    stays[place] = flags
    made = {name: value for name, value in inputs.items() if name not in encoded.used}
    made |= _compacted(layout, inputs, stays, positions, padding)
    made["mm_encoder_outputs"] = layout.replace(encoded, features, kept)
    return Pruned(made, kept, before, after)


def _changed(rows: Tensor, change: Merge | Mixture) -> Tensor:
    return change.apply(rows.unsqueeze(0), torch.ones(1, rows.shape[0], device=rows.device))[0]


def _project_changed(image: EncodedImage, change: Merge | Mixture) -> Tensor:
    """Features of what `change` makes of the projector's inputs; rows that are no patches are passed on."""
    assert image.projector is not None
    inputs = image.signals[PROJECTOR_INPUTS].masked_fill(~image.patch.unsqueeze(1), 0)
    made = image.projector(_changed(inputs, change))
    kept = change.kept[0]
    return torch.where(image.patch[kept].unsqueeze(1), made, image.features[kept])


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
) -> dict[str, Any]:
    """The token-shaped inputs without the tokens that go, and explicit positions and mask."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(stays, dtype=torch.long) if mask is None else mask
    if bool(stays.all()) and inputs.get("position_ids") is None:
        return {}
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
    given = inputs.get("position_ids")
    whole = layout.position_ids(dict(inputs), mask) if given is None else given
    if positions == "compact" and whole.dim() == 2:
        made["position_ids"] = (made["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
    else:
        made["position_ids"] = whole.gather(-1, index.expand(*whole.shape[:-1], longest).to(whole.device))
    return made


def _padding_id(layout: VisionLanguageModel) -> int:
    config = layout.config.get_text_config()
    found = getattr(config, "pad_token_id", None)
    return 0 if found is None or found < 0 else int(found)


class InputReduction(Handle):
    """A vision-language model that reads fewer image tokens, until `undo`.

    Attributes:
        stats: ``batches``, and over all of them ``image_tokens_before`` and ``image_tokens_after``.
        kept: rows of each image that stayed, of the last batch.
    """

    def __init__(self, model: Any, method: InputReducer, positions: Positions = "original"):
        super().__init__()
        layout = vision_language_model(model)
        check_layout(layout, method)
        self.kept: list[Tensor] = []
        forward, generate = model.forward, model.generate

        def pruned(inputs: dict[str, Any], padding: Literal["left", "right"] | None = None) -> dict[str, Any]:
            found = prune(layout, inputs, method, positions=positions, padding=padding)
            self.kept = found.kept
            for name, value in (("batches", 1), ("image_tokens_before", found.before)):
                self.stats[name] = self.stats.get(name, 0) + value
            self.stats["image_tokens_after"] = self.stats.get("image_tokens_after", 0) + found.after
            return found.batch

        @functools.wraps(forward)
        def reduced_forward(*args: Any, **inputs: Any) -> Any:
            if inputs.get("pixel_values") is not None:
                if args:
                    inputs["input_ids"], args = args[0], args[1:]
                inputs = pruned(inputs)
            return forward(*args, **inputs)

        @functools.wraps(generate)
        def reduced_generate(inputs: Tensor | None = None, *args: Any, **options: Any) -> Any:
            if options.get("pixel_values") is None:
                return generate(inputs, *args, **options)
            if inputs is not None:
                options["input_ids"] = inputs
            whole = options["input_ids"]
            options = pruned(options, "left")
            short = options["input_ids"].shape[1]
            for name in ("max_length", "min_length"):
                if options.get(name) is not None:
                    options[name] -= whole.shape[1] - short
            found = generate(None, *args, **options)
            sequences = found if isinstance(found, Tensor) else found.sequences
            times = sequences.shape[0] // whole.shape[0]
            prompt = whole.repeat_interleave(times, dim=0).to(sequences.device)
            sequences = torch.cat([prompt, sequences[:, short:]], dim=1)
            if isinstance(found, Tensor):
                return sequences
            found.sequences = sequences
            return found

        self.on_undo(replace_attribute(model, "forward", reduced_forward))
        self.on_undo(replace_attribute(model, "generate", reduced_generate))
