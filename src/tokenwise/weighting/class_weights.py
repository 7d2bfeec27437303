"""Class weights: rare classes count more; and plain cross-entropy as their baseline."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.classes import effective_number_weights, inverse_frequency_weights
from tokenwise.weighting.base import State
from tokenwise.weighting.classification import ClassBatch, ClassObjective, per_class

Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(json_schema_extra={"range": "one number per class"})]


class ClassUniform(ClassObjective):
    """Every example of a classifier weighs 1: plain cross-entropy, the baseline of every comparison."""

    card: ClassVar[Card] = Card(
        id="weighting/class_uniform",
        status="VERIFIED",
        checked="loss and update of transformers' own classification losses",
    )
    multi_label: ClassVar[bool] = True

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        return mean_over_classes(batch.nll())


class _WeightedClasses(ClassObjective):
    """Cross-entropy, each example weighted by its class."""

    reads: ClassVar[frozenset[str]] = frozenset({"counts"})
    reduction: ClassVar[str] = "weight_mean"

    divide_by: Literal["expected_weights", "weights", "examples"] = "expected_weights"
    """What the sum of a step's losses is divided by: the sum of the weights expected of as many examples
    (``expected_weights``), the sum of their own (``weights``, as torch does; a step that has no rare example then moves
    as far as one that has), or their number (``examples``, which makes the steps smaller)."""
    counts: Counts | None = None
    """Examples of each class in the training data; counted there unless given."""

    @abstractmethod
    def class_weights(self, counts: Tensor) -> Tensor:
        """The weight of each class, [classes], of mean 1."""

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        assert batch.counts is not None
        return per_class(self.class_weights(batch.counts).to(batch.logits.dtype), batch.labels) * batch.nll()

    def divisors(self, labels: Tensor, counts: Tensor | None, progress: float) -> Tensor:
        if self.divide_by == "examples":
            return super().divisors(labels, counts, progress)
        assert counts is not None
        weights = self.class_weights(counts)
        if self.divide_by == "expected_weights":
            return super().divisors(labels, counts, progress) * (weights @ counts / counts.sum()).item()
        return per_class(weights, labels)


class ClassBalanced(_WeightedClasses):
    """Weigh each example by its class's effective number of examples, ``(1 - beta) / (1 - beta^n)``."""

    card: ClassVar[Card] = Card(
        id="weighting/class_balanced",
        paper=Paper(
            title="Class-Balanced Loss Based on Effective Number of Samples", arxiv="1901.05555", venue="CVPR 2019"
        ),
        needs=("a label for each example",),
        status="VERIFIED",
        checked="balanced-loss (divide_by: examples) and LDAM-DRW (divide_by: weights) on seeded inputs",
    )  # fmt: skip

    beta: float = Field(0.9999, ge=0, lt=1)
    """0 is plain cross-entropy; close to 1 weighs by the inverse of a class's number of examples."""

    def class_weights(self, counts: Tensor) -> Tensor:
        return effective_number_weights(counts, self.beta)


class InverseFrequency(_WeightedClasses):
    """Weigh each example by the inverse of its class's frequency, so that all classes count alike."""

    card: ClassVar[Card] = Card(
        id="weighting/inverse_frequency",
        needs=("a label for each example",),
        status="VERIFIED",
        checked="torch's weighted cross-entropy; equal counts give plain cross-entropy",
    )

    power: float = Field(1.0, ge=0, le=1)
    """Exponent of the frequency: 1 makes all classes count alike, 0.5 is a common compromise, 0 plain cross-entropy."""

    def class_weights(self, counts: Tensor) -> Tensor:
        return inverse_frequency_weights(counts, self.power)


def mean_over_classes(losses: Tensor) -> Tensor:
    """[examples] as they are; of [examples, classes] the mean over the classes."""
    return losses if losses.dim() == 1 else losses.mean(1)
