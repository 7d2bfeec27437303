"""LLaVA-NeXT and LLaVA-OneVision: images in tiles, put together row by row with a newline at the end of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tokenwise.errors import InputError, Problem
from tokenwise.models.patch import replace_attribute
from tokenwise.models.vision_language import EncodedImage, Modality, Packing, Signal, VisionLanguageModel, square


class LlavaNext(VisionLanguageModel):
    """LLaVA-NeXT: the whole image as one tile, then its tiles as one grid without what pads it."""

    def features(self, modality: Modality, batch: Mapping[str, Any]) -> tuple[Any, Packing | None]:
        # The model's own packing, with the arguments the model gives it, arranges signals as it did features.
        pack = self.inner.pack_image_features
        found: list[Packing] = []

        def packing(image_features: Any, *args: Any, **options: Any) -> Any:
            @torch.no_grad()
            def arrange(values: list[Tensor], fill: float) -> list[Tensor]:
                newline = values[0].new_full(values[0].shape[-1:], fill)
                arranged: list[Tensor] = pack(values, *args, **{**options, "image_newline": newline})[0]
                return arranged

            found.append(Packing([len(part) for part in image_features], image_features[0].shape[1], arrange))
            return pack(image_features, *args, **options)

        restore = replace_attribute(self.inner, "pack_image_features", packing)
        try:
            output, _ = super().features(modality, batch)
        finally:
            restore()
        return output, found[0] if found else None

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        assert packing is not None
        if any(values.shape[1] != packing.patches for values in signals.values()):
            raise InputError(
                Problem(
                    "batch.vision_feature_select_strategy",
                    "hands on the class token, which is no part of the grid of a tile.",
                    "Use 'default' with a vision tower that has a class token.",
                )
            )
        # A grid that is resized has rows between tiles: each belongs to the one it has most of.
        most = max(packing.tiles)
        owners = [
            torch.eye(tiles, most, device=features.device).unsqueeze(1).expand(-1, packing.patches, -1)
            for tiles, features in zip(packing.tiles, output.pooler_output, strict=True)
        ]
        shares = packing.arrange(owners, 0.0)
        arranged = {signal: self._arranged(values, packing) for signal, values in signals.items()}
        made = []
        for index, features in enumerate(output.pooler_output):
            patch = shares[index].sum(1) > 0.5
            single = packing.tiles[index] == 1
            made.append(
                EncodedImage(
                    features,
                    {signal: values[index] for signal, values in arranged.items()},
                    patch,
                    square(packing.patches) if single else None,
                    None if single else shares[index].argmax(1).where(patch, -1),
                    None if single else self._tile_grid(batch["image_sizes"][index]),
                )
            )
        return made

    def _tile_grid(self, size: Any) -> tuple[int, int]:
        """(rows, columns) of the tiles of an image of `size` (height, width)."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        rows, columns = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        return int(rows), int(columns)

    def _arranged(self, values: Tensor, packing: Packing) -> list[Tensor]:
        """A signal of all tiles, [tiles, patches] or [tiles, patches, channels], beside the features of each image."""
        channels = values.unsqueeze(2) if values.dim() == 2 else values
        made = packing.arrange(list(channels.split(packing.tiles)), torch.nan)
        return [part.squeeze(1) for part in made] if values.dim() == 2 else made


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: large grids of tiles resized, frames of a video pooled, one newline behind each video."""

    modalities: ClassVar[Mapping[Modality, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        if modality == "image":
            return super().images(modality, output, signals, batch, packing)
        videos, frames = batch["pixel_values_videos"].shape[:2]
        pooled = {signal: self._pooled(values, videos) for signal, values in signals.items()}
        made = []
        for index, features in enumerate(output.pooler_output):
            count = features.shape[0] - 1
            frame = torch.arange(frames, device=features.device).repeat_interleave(count // frames)
            made.append(
                EncodedImage(
                    features,
                    {signal: values[index] for signal, values in pooled.items()},
                    torch.arange(count + 1, device=features.device) < count,
                    square(count) if frames == 1 else None,
                    functional.pad(frame, (0, 1), value=-1),
                    modality="video",
                )
            )
        return made

    @torch.no_grad()
    def _pooled(self, values: Tensor, videos: int) -> Tensor:
        """A signal of all frames as the model pools their features: [videos, tokens] or [videos, tokens, channels]."""
        channels = values.unsqueeze(2) if values.dim() == 2 else values
        made = self.inner.apply_pooling(channels).reshape(videos, -1, channels.shape[2])
        made = functional.pad(made, (0, 0, 0, 1), value=torch.nan)
        return made.squeeze(2) if values.dim() == 2 else made
