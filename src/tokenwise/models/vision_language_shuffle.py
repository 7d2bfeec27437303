"""InternVL, Idefics3 and SmolVLM: squares of neighbouring patches become one row by a pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.models.vision_language import EncodedImage, Modality, Packing, Signal, VisionLanguageModel, square


class _Shuffled(VisionLanguageModel):
    """Each tile is a grid of patches of its own."""

    def shuffle(self, values: Tensor) -> Tensor:
        """The model's pixel shuffle of [tiles, patches, channels]: [tiles, rows, patches of each * channels]."""
        raise NotImplementedError

    def gather(self, signal: Signal, parts: list[Tensor], modality: Modality, batch: Mapping[str, Any]) -> Tensor:
        values = torch.cat(parts)
        channels = values.unsqueeze(2) if values.dim() == 2 else values
        merged = self.shuffle(channels).unflatten(2, (-1, channels.shape[2])).mean(2)
        return merged.squeeze(2) if values.dim() == 2 else merged

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        made = []
        for index, features in enumerate(self.tiles(output.pooler_output)):
            own = {signal: values[index] for signal, values in signals.items()}
            patch = torch.ones(len(features), dtype=torch.bool, device=features.device)
            made.append(EncodedImage(features, own, patch, square(len(features))))
        return made

    def tiles(self, features: Any) -> list[Tensor]:
        """The features of each tile, from what the model's encoding gives."""
        return list(features)


class InternVL(_Shuffled):
    """InternVL: an image is so many tiles, each on its own."""

    def attention_modules(self) -> list[nn.Module]:
        return [layer.attention for layer in self.tower.encoder.layer]

    def has_class_token(self) -> bool:
        return True

    def prefix(self) -> int:
        return 1

    def shuffle(self, values: Tensor) -> Tensor:
        side = round(values.shape[1] ** 0.5)
        shuffled = self.inner.pixel_shuffle(values.unflatten(1, (side, side)), self.config.downsample_ratio)
        made: Tensor = shuffled.flatten(1, 2)
        return made


class Idefics3(_Shuffled):
    """Idefics3, SmolVLM: an image, or frame, is so many tiles, each on its own."""

    @property
    def tower(self) -> Any:
        return self.inner.vision_model

    def attention_modules(self) -> list[nn.Module]:
        return [layer.self_attn for layer in self.tower.encoder.layers]

    def has_class_token(self) -> bool:
        return False

    def prefix(self) -> int:
        return 0

    def shuffle(self, values: Tensor) -> Tensor:
        connector = self.inner.connector
        made: Tensor = connector.pixel_shuffle(values, connector.scale_factor)
        return made

    def tiles(self, features: Any) -> list[Tensor]:
        # The model gives all tiles of a row of the batch as one, and of a row without images none.
        return [tile for row in features if len(row) for tile in row.split(self.inner.image_seq_len)]
