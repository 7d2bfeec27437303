"""The losses of classifiers: what such a method is, and what it gets to see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenwise.errors import Problem
from tokenwise.method import Method
from tokenwise.weighting.base import Run, State


@dataclass
class ClassBatch:
    """The examples (or tokens) of a micro-batch that have a label, one row each.

    Args:
        logits: [examples, classes], with gradient, fp32 or fp64.
        labels: [examples] class indices, int64; with several labels per example [examples, classes] of 0 and 1.
        counts: how many examples of the training data have each class, [classes], fp64; None unless the method reads
            it, as are all below.
        step: optimizer steps finished before this one.
        progress: the share of the training that is done, in [0, 1].
        features: what the classifier's last linear layer read, [examples, hidden], with gradient.
        weight: that layer's weight, [classes, hidden].
        bias: its bias, [classes], or None where it has none.
    """

    logits: Tensor
    labels: Tensor
    counts: Tensor | None = None
    step: int = 0
    progress: float = 0.0
    features: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels."""
        return self.labels.dim() == 2

    def nll(self, logits: Tensor | None = None) -> Tensor:
        """Negative log-likelihood in nats: [examples]; with several labels of each class, [examples, classes].

        Args:
            logits: instead of the batch's own.
        """
        logits = self.logits if logits is None else logits
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, self.labels.to(logits.dtype), reduction="none")
        return F.cross_entropy(logits, self.labels, reduction="none")


class ClassObjective(Method):
    """A differentiable loss for each example of a classifier; a training step takes their mean.

    The mean is over the labelled examples of the whole optimizer step, whatever its split into micro-batches and
    processes, or weighted by `divisors`. A subclass sets `losses`, and what it `reads`.
    """

    family: ClassVar[str] = "weighting"
    traits: ClassVar[tuple[str, ...]] = ("kind", "reads", "multi_label", "scope", "reduction")
    kind: ClassVar[str] = "classes"
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which of ``counts`` and ``features`` of a `ClassBatch` the losses are made from; the others are left out."""
    multi_label: ClassVar[bool] = False
    """Whether examples may have several labels (``problem_type="multi_label_classification"``)."""
    scope: ClassVar[str] = "example"
    """``micro_batch`` where an example's loss depends on the others of its micro-batch by definition."""
    reduction: ClassVar[str] = "example_mean"
    """``weight_mean`` where the sum of the losses is divided by the sum of the weights, else ``example_mean``."""

    def start(self, run: Run) -> State | None:
        """The state of a new run; None for methods that accumulate nothing."""
        return None

    @abstractmethod
    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        """The loss of each example, with gradient: [examples]."""

    def divisors(self, labels: Tensor, counts: Tensor | None, progress: float) -> Tensor:
        """What each example adds to the number that the sum of the losses is divided by: [examples], fp64.

        Known from the labels alone, so that the division is exact for a step of any number of micro-batches.
        """
        return labels.new_ones(labels.shape[0], dtype=torch.float64)

    def problems(self, counts: Tensor, multi_label: bool) -> list[Problem]:
        """What is wrong with the counts of the training data for this method."""
        absent = (counts <= 0).nonzero().squeeze(1).tolist()
        if not absent:
            return []
        return [
            Problem(
                "counts",
                f"class {', '.join(map(str, absent))} has no example, and {type(self).__name__} cannot say what such a "
                "class is worth.",
                "Train without it (a smaller num_labels), or give counts of at least 1.",
            )
        ]


def per_class(weights: Tensor, labels: Tensor) -> Tensor:
    """The entry of each example's class: [examples]."""
    return weights.to(labels.device)[labels]


def as_counts(counts: Sequence[int] | None) -> Tensor | None:
    """Counts as a method's field has them, as a tensor: [classes], fp64."""
    return None if counts is None else torch.tensor(counts, dtype=torch.float64)
