"""Images as an image model wants them, and classifiers of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenwise.errors import InputError, Problem

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def require_pillow(field: str = "images") -> None:
    """Refuse to go on without the library that decodes images.

    Raises:
        InputError: naming the extra that brings it.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        fix = "Install it: pip install 'tokenwise[vision]'."
        raise InputError(Problem(field, "images are decoded by Pillow, which is not installed.", fix)) from None


class ImageInputs:
    """Turns images into what a model reads: by its own image processor where its directory has one; else as RGB,
    resized to the configuration's image_size, pixels scaled to [-1, 1].

    Args:
        directory: of the model.
        config: the model's configuration.
        field: the field to name in an error.

    Attributes:
        described: what is done, in words.

    Raises:
        InputError: when there is no processor and no image size, or Pillow is not installed.
    """

    def __init__(self, directory: Path | str, config: Any, field: str = "model"):
        require_pillow(field)
        self._processor: Any = None
        self._mean, self._std = np.full(3, 0.5), np.full(3, 0.5)
        if any((Path(directory) / name).is_file() for name in PROCESSOR_FILES):
            from transformers import AutoImageProcessor

            try:
                self._processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
            except Exception as error:  # the processor classes raise errors of many kinds of their own
                message = f"its image processor cannot be used: {' '.join(str(error).split()).rstrip('.')}."
                raise InputError(Problem(field, message)) from error
            self.described = f"images prepared by the model's own {type(self._processor).__name__}"
            if getattr(self._processor, "do_normalize", False):
                self._mean = np.array(self._processor.image_mean, dtype=float)
                self._std = np.array(self._processor.image_std, dtype=float)
            else:
                self._mean, self._std = np.zeros(3), np.ones(3)
            return
        size = getattr(config, "image_size", None)
        if size is None:
            message = "has neither an image processor (preprocessor_config.json) nor an image_size in its config."
            raise InputError(Problem(field, message, "Save the model's image processor beside it."))
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self._size = int(width), int(height)
        self.described = (
            f"no image processor beside the model: images as RGB, resized to {width} x {height}, pixels scaled to "
            "[-1, 1] (x / 127.5 - 1)"
        )

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """The pixels, [images, 3, height, width], fp32."""
        import torch
        from PIL.Image import Resampling

        rgb = [image.convert("RGB") for image in images]
        if self._processor is not None:
            found: Tensor = self._processor(images=rgb, return_tensors="pt")["pixel_values"]
            return found.float()
        resized = [image if image.size == self._size else image.resize(self._size, Resampling.BICUBIC) for image in rgb]
        pixels = np.stack([np.asarray(image, dtype=np.float32) for image in resized])
        return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def shown(self, pixels: Tensor) -> NDArray[np.uint8]:
        """An image as the model sees it, [height, width, 3], from its pixels [3, height, width]."""
        values = pixels.float().cpu().numpy().transpose(1, 2, 0) * self._std + self._mean
        return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def load_classifier(directory: Path | str) -> Any:
    """An image classifier in evaluation mode, fp32, on the CPU. Weights are read from safetensors alone."""
    import torch
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(
        directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    ).eval()


def empty_classifier(config: Any) -> Any:
    """The same model without weights: nothing is allocated, shapes alone can be asked for."""
    import copy

    import torch
    from transformers import AutoModelForImageClassification

    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(copy.deepcopy(config)).eval()


def patch_grid(model: Any, pixels: Tensor, patches: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of an image; None where they are not a plain grid.

    Args:
        model: its encoder's configuration says how large a patch is.
        pixels: [..., height, width].
        patches: how many there are.
    """
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "patch_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    rows, columns = pixels.shape[-2] // height, pixels.shape[-1] // width
    return (rows, columns) if rows * columns == patches else None
