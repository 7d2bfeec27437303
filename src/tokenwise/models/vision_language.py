"""How vision-language models of transformers are laid out: where image features come from and where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import AttentionCall, listen

Kind = Literal["class_row", "columns", "keys", "projector_inputs"]


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
    """One image as the language model gets it.

    Args:
        features: [tokens, channels], the rows that stand for it in the language model.
        signals: what was recorded, one row for each of `features`: [tokens] or [tokens, channels], fp32; NaN where a
            row is no patch (the newline of tiled images).
        patch: which rows are patches, [tokens], bool.
        grid: (rows, columns) of patches where they are one grid; else None.
        tile: the tile of each row, [tokens], int64; 0 everywhere for untiled images, and where a tiled one has an
            overview.
        tile_grid: (rows, columns) of the tiles 1, 2, ... that make up the image beside its overview; else None.
        projector: makes features of projector inputs, one row at a time; None where the model has no such projector.
    """

    features: Tensor
    signals: dict[Signal, Tensor]
    patch: Tensor
    grid: tuple[int, int] | None = None
    tile: Tensor | None = None
    tile_grid: tuple[int, int] | None = None
    projector: nn.Module | None = None


@dataclass
class Encoded:
    """The images of a batch.

    Args:
        images: in the order of their placeholders.
        output: what the model's own encoding gave; its ``pooler_output`` is a list with the features of each image.
        used: the batch's keys that this replaces.
    """

    images: list[EncodedImage]
    output: Any
    used: tuple[str, ...] = ()
    positions: Callable[[], Tensor] | None = field(default=None, repr=False)


class VisionLanguageModel:
    """A model whose images become rows of its language model's input.

    A subclass knows one layout. What all share is here: images are encoded by the model's own
    ``get_image_features``, and their features passed on as ``mm_encoder_outputs``.
    """

    kinds: tuple[str, ...] = ()
    """The ``model_type`` of the configurations it serves."""
    pixels: tuple[str, ...] = ("pixel_values",)
    """The batch's keys that only the encoding of images reads."""

    def __init__(self, model: Any):
        self.model = model
        self.config = model.config
        self.image_token = model.config.image_token_id

    @property
    def inner(self) -> Any:
        """The model without its language-modelling head."""
        return self.model.base_model

    @property
    def tower(self) -> nn.Module:
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

    def encode(self, batch: dict[str, Any], signals: Iterable[Signal] = ()) -> Encoded:
        """Encode the images of a batch, and record signals on the way."""
        recorded: dict[Signal, list[Tensor]] = {}
        signals = tuple(dict.fromkeys(signals))
        projector = self.projector()
        modules = self.attention_modules() if any(signal != PROJECTOR_INPUTS for signal in signals) else []
        with ExitStack() as stack:
            for signal in signals:
                if signal == PROJECTOR_INPUTS:
                    assert projector is not None
                    calls = recorded.setdefault(signal, [])
                    stack.callback(projector.register_forward_pre_hook(_keeper(calls)).remove)
                    continue
                if not -len(modules) <= signal.layer < len(modules):
                    message = f"{signal.layer} is none of the vision tower's {len(modules)}."
                    raise InputError(Problem("layer", message, "Count from 0, or from the end with -1."))
                calls = recorded.setdefault(signal, [])
                stack.callback(listen(modules[signal.layer], self._recorder(signal, calls)))
            output = self.features(batch)
        found = {signal: self.gather(parts) for signal, parts in recorded.items()}
        images = self.images(output, found, batch)
        for image in images:
            image.projector = projector
        return Encoded(images, output, tuple(key for key in self.pixels if key in batch))

    def features(self, batch: dict[str, Any]) -> Any:
        """What the model's own encoding gives."""
        given = {key: batch[key] for key in self.pixels if batch.get(key) is not None}
        return self.inner.get_image_features(**given, return_dict=True)

    def gather(self, parts: list[Tensor]) -> Tensor:
        """The calls of one block's attention as one tensor [images or tiles, patches, ...]."""
        return torch.cat(parts)

    def images(self, output: Any, signals: dict[Signal, Tensor], batch: dict[str, Any]) -> list[EncodedImage]:
        """The images, with the signals beside their features."""
        raise NotImplementedError

    def replace(self, encoded: Encoded, features: list[Tensor], kept: list[Tensor]) -> Any:
        """What the model is to be given as the encoded images: `features` of each image, its rows `kept`."""
        output = type(encoded.output)(**{**encoded.output, "pooler_output": features})
        return {"image": output}

    def position_ids(self, batch: dict[str, Any], attention_mask: Tensor) -> Tensor:
        """Positions of the whole batch, [batch, tokens], or [axes, batch, tokens] for positions in time and space."""
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)

    def placeholders(self, input_ids: Tensor) -> Tensor:
        """Which tokens stand for image features, [batch, tokens], bool."""
        return input_ids == self.image_token

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
    """LLaVA: every image is one grid of patches, in their order."""

    kinds = ("llava",)
    pixels = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def projector(self) -> nn.Module | None:
        return self.inner.multi_modal_projector

    def images(self, output: Any, signals: dict[Signal, Tensor], batch: dict[str, Any]) -> list[EncodedImage]:
        made = []
        strategy = batch.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        # With "full" the class token is passed on as well.
        extra = self.prefix() if strategy == "full" else 0
        for index, features in enumerate(output.pooler_output):
            count = features.shape[0]
            own = {signal: _behind(values[index], count) for signal, values in signals.items()}
            patch = torch.arange(count, device=features.device) >= extra
            side = round((count - extra) ** 0.5)
            grid = (side, side) if side * side == count - extra else None
            made.append(EncodedImage(features, own, patch, grid))
        return made


def _behind(values: Tensor, count: int) -> Tensor:
    """`values` behind as many rows that have none as make `count` rows of them."""
    return torch.cat([values.new_full((count - values.shape[0], *values.shape[1:]), torch.nan), values])


LAYOUTS: tuple[type[VisionLanguageModel], ...] = (Llava,)
"""Every layout that is known; the one place that lists them."""


def vision_language_model(model: nn.Module) -> VisionLanguageModel:
    """The layout of a vision-language model.

    Raises:
        InputError: when it is not known.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for layout in LAYOUTS:
        if kind in layout.kinds:
            return layout(model)
    known = ", ".join(name for layout in LAYOUTS for name in layout.kinds)
    raise InputError(
        Problem("model", f"{type(model).__name__} is no vision-language model known here.", f"Known are {known}.")
    )
