"""What a classifier's method does to each example, in one number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.models.frozen import evaluating
from tokenwise.models.head import base_of
from tokenwise.weighting.base import Run, State
from tokenwise.weighting.class_training import ClassForward, check_classifier, counts_of
from tokenwise.weighting.class_weights import mean_over_classes
from tokenwise.weighting.classification import ClassObjective


@dataclass
class ExampleWeights:
    """What a method makes of some examples (or tokens) that have a label.

    Args:
        weights: norm of the gradient that the losses have at each example's logits, relative to that of plain
            cross-entropy, before the division of the step; None where plain cross-entropy has none. For class weights
            it is the weight itself.
        nll: plain cross-entropy of each example in nats; with several labels the mean over the classes.
        losses: the method's own.
    """

    weights: list[float | None]
    nll: list[float]
    losses: list[float]


def example_weights(
    model: Any,
    method: ClassObjective,
    batch: Mapping[str, Any],
    *,
    progress: float = 0.0,
    state: State | None = None,
    seed: int = 0,
) -> ExampleWeights:
    """The weight that a method gives each example of a batch, under the classifier as it is, without dropout.

    Args:
        model: a classifier.
        method: the method; one that reads class counts has them in its field ``counts``.
        batch: the model's inputs with ``labels``: one micro-batch, which matters to methods of scope ``micro_batch``.
        progress: the share of the training that is done, in [0, 1].
        state: what the training accumulated so far; that of its beginning unless given. A method that learns while it
            weighs (STORM) changes it.
        seed: of the state of a beginning.

    Raises:
        InputError: when labels or counts are missing, or the model is no classifier that the method knows.
    """
    base = base_of(model)
    multi_label = check_classifier(base, method)
    if batch.get("labels") is None:
        raise InputError(Problem("batch.labels", "is missing.", "Give a class for each example."))
    if not 0 <= progress <= 1:
        raise InputError(Problem("progress", f"{progress!r} is not in [0, 1]."))
    counts = None
    if "counts" in method.reads:
        counts = counts_of(method, None, base.config.num_labels, multi_label).to(base.device)
    if state is None:
        state = method.start(Run(seed, device=base.device))
    forward = ClassForward(base, method, state, counts, multi_label)
    forward.progress = progress
    inputs = {name: values.to(base.device) for name, values in batch.items() if name != "labels"}
    with evaluating(base), torch.no_grad():
        _, seen = forward.read(base.forward, batch["labels"].to(base.device), **inputs)
    # In fp64 the gradient of an example that is all but certain still has digits.
    seen.logits = seen.logits.detach().double().requires_grad_()
    with torch.enable_grad():
        losses = method.losses(seen, state)
        nll = mean_over_classes(seen.nll())
        own, plain = (_norms(values, seen.logits) for values in (losses, nll))
    weights = [ours / theirs if theirs else None for ours, theirs in zip(own.tolist(), plain.tolist(), strict=True)]
    return ExampleWeights(weights, nll.tolist(), losses.tolist())


def _norms(losses: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    return gradient.norm(dim=1)
