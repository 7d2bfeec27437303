"""Qwen's vision-language models: patches of all images in one row, merged by fours, positions in time and space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.vision_language import EncodedImage, Modality, Packing, Signal, VisionLanguageModel


class Qwen2VL(VisionLanguageModel):
    """Qwen2-VL, Qwen3-VL: one call of attention for each image, or frame of a video."""

    modalities: ClassVar[Mapping[Modality, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    grids: ClassVar[tuple[str, ...]] = (
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "mm_token_type_ids",
    )

    @property
    def tower(self) -> Any:
        return self.inner.visual

    def attention_modules(self) -> list[nn.Module]:
        return [block.attn for block in self.tower.blocks]

    def has_class_token(self) -> bool:
        return False

    def prefix(self) -> int:
        return 0

    def check(self, batch: Mapping[str, Any]) -> None:
        needed = [
            f"{modality}_grid_thw" for modality, pixels in self.modalities.items() if batch.get(pixels) is not None
        ]
        if batch.get("position_ids") is None:
            needed.append("mm_token_type_ids")
        for name in needed:
            if batch.get(name) is None:
                raise InputError(
                    Problem(
                        f"batch.{name}",
                        "is missing; positions in time and space are made of it.",
                        "Pass on everything that the model's processor makes.",
                    )
                )

    def gather(self, signal: Signal, parts: list[Tensor], modality: Modality, batch: Mapping[str, Any]) -> Tensor:
        """One row for each row of the language model, [rows of all images, ...]."""
        if signal.kind == "columns":
            # A mean over the queries of a window, or frame, made the sum: windows differ in size.
            parts = [part * part.shape[1] for part in parts]
        merged = torch.cat(parts, dim=1)[0].unflatten(0, (-1, self.tower.spatial_merge_size**2)).mean(1)
        return self.in_order(merged, batch[f"{modality}_grid_thw"])

    def in_order(self, merged: Tensor, grids: Tensor) -> Tensor:
        """Rows in the order of the language model, from the order of the vision tower's blocks."""
        return merged

    def images(
        self,
        modality: Modality,
        output: Any,
        signals: dict[Signal, Tensor],
        batch: Mapping[str, Any],
        packing: Packing | None,
    ) -> list[EncodedImage]:
        side = self.tower.spatial_merge_size
        deeper = getattr(output, "deepstack_features", None) or []
        made: list[EncodedImage] = []
        start = 0
        for index, (features, grid) in enumerate(
            zip(output.pooler_output, batch[f"{modality}_grid_thw"].tolist(), strict=True)
        ):
            times, rows, columns = int(grid[0]), int(grid[1]) // side, int(grid[2]) // side
            count = features.shape[0]
            own = {signal: values[start : start + count] for signal, values in signals.items()}
            for signal in own:
                if signal.kind == "columns":
                    own[signal] = own[signal] / (count * side**2)
            frames = torch.arange(times, device=features.device).repeat_interleave(rows * columns)
            made.append(
                EncodedImage(
                    features,
                    own,
                    torch.ones(count, dtype=torch.bool, device=features.device),
                    (rows, columns),
                    frames if times > 1 else None,
                    modality=modality,
                    deeper=tuple(layer[index] for layer in deeper),
                )
            )
            start += count
        return made

    def position_ids(self, batch: Mapping[str, Any], attention_mask: Tensor) -> Tensor:
        given = {name: batch[name] for name in self.grids if batch.get(name) is not None}
        made: Tensor = self.inner.get_rope_index(batch["input_ids"], **given, attention_mask=attention_mask)[0]
        return made

    def keep_state(self) -> Callable[[], None]:
        before, inner = self.inner.rope_deltas, self.inner

        def put_back() -> None:
            inner.rope_deltas = before

        return put_back


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: patches stand in the order of windows, and most blocks attend within these."""

    def in_order(self, merged: Tensor, grids: Tensor) -> Tensor:
        from transformers.vision_utils import get_vision_window_index

        tower = self.tower
        index, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        return merged[torch.argsort(index).to(merged.device)]
