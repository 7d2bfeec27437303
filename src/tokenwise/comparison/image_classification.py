"""Runs of image classification: a trained classifier with fewer tokens, beside itself with all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenwise.comparison.clock import Clock, now
from tokenwise.comparison.images import Pictures
from tokenwise.comparison.memory import PeakMemory
from tokenwise.comparison.pictures import picture_of
from tokenwise.comparison.quality import ImageQuality
from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.comparison.training import Progress, RunFailed, build_method, versions_of
from tokenwise.models.encoders import find_encoder
from tokenwise.models.flops import FlopMeter
from tokenwise.models.images import ImageInputs, load_classifier
from tokenwise.policies.plans import Shape
from tokenwise.reduction.apply import reduce
from tokenwise.reduction.base import EncoderReducer
from tokenwise.reduction.dense import Dense
from tokenwise.reduction.encoder import EncoderReduction

WARM = 2
"""Batches before anything is timed; memory is measured on them."""
METERED = 4
"""Batches on which operations, tokens and scoring are measured."""
TIMED = 8
"""Batches that are timed at least; where there are fewer they are taken again."""
EXAMPLES = 4
"""Images that the report draws."""


def run(job: Job, folder: Path, progress: Progress) -> Result:
    """Measure the job's method on every image, with the dense model in turn.

    Every batch goes through both models, one right after the other and in alternating order, so that what else the
    machine does slows down both alike. Operations and scoring are measured in passes of their own.
    """
    pictures = Pictures.load(job.task["held_out_rows"])
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = load_classifier(job.task["model"]).to(device)
    inputs = ImageInputs(job.task["model"], model.config)
    method = build_method(job, "reduction")
    assert isinstance(method, EncoderReducer)
    size = min(job.task["batch_size"], len(pictures))

    def batches(count: int | None = None) -> Iterator[Tensor]:
        """So many whole batches, the first ones again where there are no more; or all images once."""
        starts = range(0, len(pictures), size)
        whole = [start for start in starts if start + size <= len(pictures)]
        for start in starts if count is None else (whole[number % len(whole)] for number in range(count)):
            yield inputs([pictures.image(i) for i in range(start, min(start + size, len(pictures)))]).to(device)

    def reduced() -> AbstractContextManager[Any]:
        # The dense model is timed without any hook.
        return nullcontext() if isinstance(method, Dense) else reduce(model, method)

    with torch.no_grad():
        memory = PeakMemory(device)
        warm = list(batches(WARM))
        with reduced():
            memory.resume()
            for pixels in warm:
                model(pixel_values=pixels)
            memory.pause()
        quality, seconds, dense_seconds = _measure(model, reduced, batches, pictures, size, device, progress)
        flops, metered = _meter(model, method, reduced, batches)
        scoring = None if isinstance(method, Dense) else _scoring(model, method, batches, device)
        example = _example(model, method, pictures, inputs, device)
    if not quality.finite:
        raise RunFailed("The loss of an image is not finite.")
    return Result(
        job=job,
        status="finished",
        quality=quality,
        costs=Costs(
            flops=flops / size,
            wall_seconds=seconds / size,
            peak_memory_bytes=memory.peak,
            dense_seconds=dense_seconds / size,
            scoring_seconds=None if scoring is None else scoring / size,
            block_flops=2 * metered["macs"],
            tokens_before=metered["tokens_before"],
            tokens_after=metered["tokens_after"],
            token_share=metered["mean_share"],
        ),
        example=example,
        versions=versions_of(device),
    )


def _measure(
    model: Any,
    reduced: Callable[[], AbstractContextManager[Any]],
    batches: Callable[..., Iterator[Tensor]],
    pictures: Pictures,
    size: int,
    device: torch.device,
    progress: Progress,
) -> tuple[ImageQuality, float, float]:
    """The quality on all images; the median time of a whole batch, reduced and dense."""

    def timed(pixels: Tensor, context: AbstractContextManager[Any]) -> tuple[Tensor, float]:
        with context:
            start = now(device)
            logits = model(pixel_values=pixels).logits
            return logits.float(), now(device) - start

    def both(pixels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        order = [("reduced", reduced), ("dense", nullcontext)]
        found = {}
        for name, context in order if number % 2 == 0 else reversed(order):
            found[name], seconds = timed(pixels, context())
            if len(pixels) == size:
                times[name].append(seconds)
        return found["reduced"], found["dense"]

    times: dict[str, list[float]] = {"reduced": [], "dense": []}
    predictions, dense, losses = [], [], []
    done = 0
    for number, pixels in enumerate(batches()):
        logits, plain = both(pixels, number)
        labels = torch.from_numpy(pictures.labels[done : done + len(pixels)]).to(device)
        done += len(pixels)
        losses += F.cross_entropy(logits, labels, reduction="none").double().tolist()
        predictions += logits.argmax(-1).tolist()
        dense += plain.argmax(-1).tolist()
        progress({"event": "progress", "share": 0.9 * done / len(pictures)})
    for number, pixels in enumerate(batches(max(TIMED - len(times["dense"]), 0))):
        both(pixels, number)
    classes = len(model.config.id2label)
    quality = ImageQuality(pictures.labels.tolist(), predictions, dense, losses, classes)
    return quality, median(times["reduced"]), median(times["dense"])


def _meter(
    model: Any,
    method: EncoderReducer,
    reduced: Callable[[], AbstractContextManager[Any]],
    batches: Callable[..., Iterator[Tensor]],
) -> tuple[float, dict[str, float]]:
    """Operations of a batch as they are counted; per image what the closed form says, and tokens."""
    total, seen = 0, []
    for pixels in batches(METERED):
        with reduced(), FlopMeter() as meter:
            model(pixel_values=pixels)
        total += meter.flops
        with reduce(model, method) as handle:
            model(pixel_values=pixels)
            seen.append(dict(handle.stats))
    encoder = find_encoder(model)
    before = int(seen[0]["tokens_before"])
    shape = Shape(before, len(encoder.blocks), encoder.prefix, encoder.width, encoder.hidden_width, encoder.gated)
    dense = shape.macs([before] * shape.layers, [before] * shape.layers)
    means = {name: fmean(stats[name] for stats in seen) for name in seen[0]}
    return total / METERED, {**means, "macs": means["macs_share"] * dense}


def _scoring(
    model: Any, method: EncoderReducer, batches: Callable[..., Iterator[Tensor]], device: torch.device
) -> float:
    """The median time that looking for the tokens to keep takes in a batch."""
    found = []
    for pixels in batches(METERED):
        clock = Clock(method, device)
        with reduce(model, method) as handle:
            assert isinstance(handle, EncoderReduction)
            handle.method = clock  # type: ignore[assignment]
            model(pixel_values=pixels)
        found.append(clock.seconds)
    return median(found)


def _example(
    model: Any, method: EncoderReducer, pictures: Pictures, inputs: ImageInputs, device: torch.device
) -> dict[str, list[Any]] | None:
    """A few images and what is kept of each; None where tokens are not a plain grid of patches."""
    which = np.unique(np.linspace(0, len(pictures) - 1, EXAMPLES).round().astype(int)).tolist()
    pixels = inputs([pictures.image(index) for index in which]).to(device)
    names = model.config.id2label
    with reduce(model, method) as handle:
        classes = model(pixel_values=pixels).logits.argmax(-1).tolist()
        drawn = [picture_of(handle, model, inputs, pixels, place) for place in range(len(which))]
    found = [
        {**picture, "label": str(names[int(pictures.labels[index])]), "prediction": str(names[predicted])}
        for picture, index, predicted in zip(drawn, which, classes, strict=True)
        if picture is not None
    ]
    return {"pictures": found} if found else None
