"""How vision-language models of transformers are laid out: where image features come from and where they go."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import AttentionCall, listen

Kind = Literal["class_row", "columns", "keys", "projector_inputs"]
Modality = Literal["image", "video"]


@dataclass(frozen=True)
class Signal:
    """Something of the vision tower that is recorded while it runs.

    Args:
        kind: ``class_row``: attention of the class token to each patch; ``columns``: attention each patch receives,
            as a mean over all queries; ``keys``: each patch's keys; ``projector_inputs``: what the projector reads, in
            the model's own type.
        layer: index of the block, from 0, or from the end with -1 for the last; not read for ``projector_inputs``.
        heads: what becomes of the heads: their ``mean``, or ``sum``; ``one`` makes queries and keys of all heads one
            head of their whole width.
    """

    kind: Kind
    layer: int = -1
    heads: Literal["mean", "sum", "one"] = "mean"


PROJECTOR_INPUTS = Signal("projector_inputs")
"""What the projector makes each patch's feature of."""


@dataclass
class EncodedImage:
    """One image, tile or video as the language model gets it.

    Args:
        features: [tokens, channels], the rows that stand for it in the language model.
        signals: what was recorded, one row for each of `features`: [tokens] or [tokens, channels], fp32; NaN where a
            row is no patch (the newline of tiled images). Where patches are merged into one row, their mean.
        patch: which rows are patches, [tokens], bool.
        grid: (rows, columns) of patches where they are one grid, or one such for each frame; else None.
        tile: the tile, or frame, of each row, [tokens], int64, -1 where a row is no patch; None for images of one
            tile.
        tile_grid: (rows, columns) of the tiles 1, 2, ... that make up the image beside its overview, tile 0; else None.
        projector: makes features of projector inputs, one row at a time; None where the model has no such projector.
        modality: ``image`` or ``video``.
        deeper: what deeper layers of the language model get beside `features`, each [tokens, channels].
    """

    features: Tensor
    signals: dict[Signal, Tensor]
    patch: Tensor
    grid: tuple[int, int] | None = None
    tile: Tensor | None = None
    tile_grid: tuple[int, int] | None = None
    projector: nn.Module | None = None
    modality: Modality = "image"
    deeper: tuple[Tensor, ...] = ()


@dataclass
class Encoded:
    """The images and videos of a batch.

    Args:
        images: in the order of their placeholders, videos after images.
        outputs: what the model's own encoding gave for each modality.
        used: the batch's keys that this replaces.
    """

    images: list[EncodedImage]
    outputs: dict[Modality, Any]
    used: tuple[str, ...] = ()


@dataclass
class Packing:
    """How a model arranged the tiles of its images.

    Args:
        tiles: how many tiles each image has.
        patches: how many rows each tile had before.
        arrange: does with values of each image's tiles, [tiles, patches, channels], what the model did with their
            features, and gives [tokens, channels] of each image, with a number where a row is no patch.
    """

    tiles: list[int]
    patches: int
    arrange: Callable[[list[Tensor], float], list[Tensor]]


class VisionLanguageModel:
    """A model whose images become rows of its language model's input.

    A subclass knows one layout. What all share is here: images are encoded by the model's own
    ``get_image_features`` (videos by ``get_video_features``), and their features passed on as ``mm_encoder_outputs``.
    """

    modalities: ClassVar[Mapping[Modality, str]] = {"image": "pixel_values"}
    """The batch's key with the pixels of each modality."""
    grids: ClassVar[tuple[str, ...]] = ()
    """The batch's keys that only positions are made of."""

    def __init__(self, model: Any):
        self.model = model
        self.config = model.config
        self.timed: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda record: record
        """Wraps what records the signals of the vision tower, so that its time can be taken."""

    @property
    def inner(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.inner.vision_tower

    def attention_modules(self) -> list[nn.Module]:
        """The attention module of each block of the vision tower."""
        from tokenwise.models.encoders import find_encoder

        return [block.attention for block in find_encoder(self.tower).blocks]

    def has_class_token(self) -> bool:
        """Whether the vision tower has a class token."""
        from tokenwise.models.encoders import find_encoder

        return find_encoder(self.tower).has_class_token

    def prefix(self) -> int:
        """Tokens of the vision tower before the patches."""
        from tokenwise.models.encoders import find_encoder

        return find_encoder(self.tower).prefix

    def projector(self) -> nn.Module | None:
        """The module that makes features of the tower's patches, where it makes each of one; else None."""
        return None

    def has_pixels(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch has images or videos that are not encoded yet."""
        return any(batch.get(pixels) is not None for pixels in self.modalities.values())

    def check(self, batch: Mapping[str, Any]) -> None:
        """Raise InputError where a batch lacks what positions are made of."""

    def encode(self, batch: dict[str, Any], signals: Iterable[Signal] = ()) -> Encoded:
        """Encode the images of a batch, and record signals on the way."""
        signals = tuple(dict.fromkeys(signals))
        projector = self.projector()
        attended = [signal for signal in signals if signal != PROJECTOR_INPUTS]
        modules = self.attention_modules() if attended else []
        for signal in attended:
            if not -len(modules) <= signal.layer < len(modules):
                message = f"{signal.layer} is none of the vision tower's {len(modules)}."
                raise InputError(Problem("layer", message, "Count from 0, or from the end with -1."))
        encoded = Encoded([], {})
        used: list[str] = []
        for modality, pixels in self.modalities.items():
            if batch.get(pixels) is None:
                continue
            calls: dict[Signal, list[Tensor]] = {signal: [] for signal in signals}
            with ExitStack() as stack:
                for signal in attended:
                    record = self.timed(self._recorder(signal, calls[signal]))
                    stack.callback(listen(modules[signal.layer], record))
                if PROJECTOR_INPUTS in calls:
                    assert projector is not None
                    stack.callback(projector.register_forward_pre_hook(_keeper(calls[PROJECTOR_INPUTS])).remove)
                output, packing = self.features(modality, batch)
            found = {signal: self.gather(signal, parts, modality, batch) for signal, parts in calls.items()}
            encoded.outputs[modality] = output
            encoded.images += self.images(modality, output, found, batch, packing)
            used += self._read(modality, batch)
        for image in encoded.images:
            image.projector = projector
        encoded.used = tuple(name for name in used if name not in self.grids)
        return encoded

    def features(self, modality: Modality, batch: Mapping[str, Any]) -> tuple[Any, Packing | None]:
        """What the model's own encoding gives, and how it arranged tiles; None where it does not."""
        given = {name: batch[name] for name in self._read(modality, batch)}
        return getattr(self.inner, f"get_{modality}_features")(**given, return_dict=True), None

    def gather(self, signal: Signal, parts: list[Tensor], modality: Modality, batch: Mapping[str, Any]) -> Tensor:
        """The calls of one block's attention as one tensor [images or tiles, patches, ...]."""
        return torch.cat(parts)

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        """The images, with the signals beside their features."""
        raise NotImplementedError

    def replace(
        self, encoded: Encoded, features: list[Tensor], deeper: list[tuple[Tensor, ...]]
    ) -> dict[Modality, Any]:
        """What the model is to be given as encoded images, from the `features` of each and what goes `deeper`."""
        made: dict[Modality, Any] = {}
        for modality, output in encoded.outputs.items():
            own = [index for index, image in enumerate(encoded.images) if image.modality == modality]
            rows: list[Tensor] | Tensor = [features[index] for index in own]
            if isinstance(output.pooler_output, Tensor):
                # One tensor, its first dimension that of images. Where their numbers of rows differ each row stands
                # for an image of its own, which the model does not tell apart.
                equal = len({len(part) for part in rows}) == 1
                rows = torch.stack(list(rows)) if equal else torch.cat(list(rows)).unsqueeze(1)
            changed: dict[str, Any] = {"pooler_output": rows}
            if any(deeper[index] for index in own):
                changed["deepstack_features"] = [
                    list(layer) for layer in zip(*(deeper[index] for index in own), strict=True)
                ]
            made[modality] = type(output)(**{**output, **changed})
        return made

    def position_ids(self, batch: Mapping[str, Any], attention_mask: Tensor) -> Tensor:
        """Positions of the whole batch, [batch, tokens], or [axes, batch, tokens] for positions in time and space."""
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)

    def placeholders(self, input_ids: Tensor, modality: Modality = "image") -> Tensor:
        """Which tokens stand for features of images, or of videos, [batch, tokens], bool."""
        made: Tensor = input_ids == getattr(self.config, f"{modality}_token_id")
        return made

    def places(self, input_ids: Tensor) -> Tensor:
        """Which tokens stand for features of any modality, [batch, tokens], bool."""
        return torch.stack([self.placeholders(input_ids, modality) for modality in self.modalities]).any(0)

    def keep_state(self) -> Callable[[], None]:
        """Remember what the model itself remembers from call to call; the function that puts it back."""
        return lambda: None

    def _read(self, modality: Modality, batch: Mapping[str, Any]) -> list[str]:
        """The batch's keys that the encoding of a modality reads."""
        encode = getattr(self.inner, f"get_{modality}_features")
        return [name for name in inspect.signature(encode).parameters if batch.get(name) is not None]

    def _recorder(self, signal: Signal, calls: list[Tensor]) -> Callable[[AttentionCall], None]:
        prefix = self.prefix()

        def record(call: AttentionCall) -> None:
            if signal.kind == "keys":
                keys = call.key.float()
                found = keys.mean(1) if signal.heads == "mean" else keys.transpose(1, 2).flatten(2)
                calls.append(found[:, prefix:])
                return
            if signal.heads == "one":
                query, key = (values.transpose(1, 2).flatten(2).unsqueeze(1) for values in (call.query, call.key))
                call = AttentionCall(call.module, query, key, call.value, call.mask, query.shape[-1] ** -0.5)
            if signal.kind == "class_row":
                each = call.rows(torch.zeros(1, dtype=torch.long, device=call.query.device))[:, :, 0]
            else:
                each = call.columns()
            calls.append((each.sum(1) if signal.heads == "sum" else each.mean(1))[:, prefix:])

        return record


def _keeper(calls: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _, inputs: calls.append(inputs[0])


class Llava(VisionLanguageModel):
    """LLaVA, PaliGemma: every image is one grid of patches, in their order."""

    def projector(self) -> nn.Module | None:
        module: nn.Module = self.inner.multi_modal_projector
        return module

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        made = []
        strategy = batch.get("vision_feature_select_strategy") or getattr(
            self.config, "vision_feature_select_strategy", "full"
        )
        # With "full" the class token is passed on as well.
        extra = self.prefix() if strategy == "full" else 0
        for index, features in enumerate(output.pooler_output):
            count = features.shape[0]
            own = {signal: _behind(values[index], count) for signal, values in signals.items()}
            patch = torch.arange(count, device=features.device) >= extra
            made.append(EncodedImage(features, own, patch, square(count - extra)))
        return made


def square(count: int) -> tuple[int, int] | None:
    """(rows, columns) of as many patches where they make a square; else None."""
    side = round(count**0.5)
    return (side, side) if side * side == count else None


def _behind(values: Tensor, count: int) -> Tensor:
    """`values` behind as many rows that have none as make `count` rows of them."""
    return torch.cat([values.new_full((count - values.shape[0], *values.shape[1:]), torch.nan), values])


LAYOUTS: Mapping[str, str] = {
    "llava": "vision_language:Llava",
    "paligemma": "vision_language:Llava",
    "llava_next": "vision_language_tiles:LlavaNext",
    "llava_onevision": "vision_language_tiles:LlavaOnevision",
    "qwen2_vl": "vision_language_qwen:Qwen2VL",
    "qwen2_5_vl": "vision_language_qwen:Qwen25VL",
    "qwen3_vl": "vision_language_qwen:Qwen2VL",
    "internvl": "vision_language_shuffle:InternVL",
    "idefics3": "vision_language_shuffle:Idefics3",
    "smolvlm": "vision_language_shuffle:Idefics3",
}
"""The layout (module and class) of each ``model_type`` that is known; the one place that lists them."""


def vision_language_model(model: nn.Module) -> VisionLanguageModel:
    """The layout of a vision-language model.

    Raises:
        InputError: when it is not known.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", None))
    if kind not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise InputError(
            Problem("model", f"{type(model).__name__} is no vision-language model known here.", f"Known are {known}.")
        )
    module, name = LAYOUTS[kind].split(":")
    layout: type[VisionLanguageModel] = getattr(importlib.import_module(f"tokenwise.models.{module}"), name)
    return layout(model)
