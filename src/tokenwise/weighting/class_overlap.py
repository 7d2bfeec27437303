"""Losses that hold back on what a classifier knows already: Dice and focal loss."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.signals.classes import DiceDenominator, dice_loss, focal
from tokenwise.weighting.base import State
from tokenwise.weighting.class_weights import mean_over_classes
from tokenwise.weighting.classification import ClassBatch, ClassObjective


class Dice(ClassObjective):
    """Self-adjusting Dice loss: one minus the overlap of each class's probability and label, close to the F1 score.

    Summed over the classes, with the probabilities of a softmax; with several labels per example of a sigmoid.
    """

    card: ClassVar[Card] = Card(
        id="weighting/dice",
        paper=Paper(title="Dice Loss for Data-imbalanced NLP Tasks", arxiv="1911.02855", venue="ACL 2020"),
        status="VERIFIED",
        checked="dice_loss_for_NLP on seeded inputs, denominators 'batch' and 'square'; 'paper' on worked numbers; the "
        "official hard example mining is left out, and the sum over several labels is ours",
    )
    multi_label: ClassVar[bool] = True

    denominator: DiceDenominator = "square"
    """What the overlap is divided by: of each example alone (``paper``, ``square``), or over the micro-batch
    (``batch``, which therefore depends on its size)."""
    alpha: float = Field(0.01, ge=0)
    """Exponent of 1 - p; 0 is the plain Dice loss."""
    smoothing: float = Field(1.0, ge=0)
    """Added to numerator and denominator."""

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        if batch.multi_label:
            probabilities, targets = batch.logits.sigmoid(), batch.labels
        else:
            probabilities = batch.logits.softmax(1)
            targets = F.one_hot(batch.labels, batch.logits.shape[1])
        found = dice_loss(probabilities, targets.to(probabilities.dtype), self.alpha, self.smoothing, self.denominator)
        return found.sum(1)


class ClassFocal(ClassObjective):
    """Focal loss for classifiers: weigh each example by ``(1-p)^gamma`` of its own label's probability.

    With several labels per example each class is a question of its own, and the mean over the classes is taken.
    """

    card: ClassVar[Card] = Card(
        id="weighting/class_focal",
        paper=Paper(title="Focal Loss for Dense Object Detection", arxiv="1708.02002", venue="ICCV 2017"),
        status="VERIFIED",
        checked="LDAM-DRW's (softmax) and balanced-loss's (sigmoid, another divisor) focal losses on seeded inputs",
    )
    multi_label: ClassVar[bool] = True

    gamma: float = Field(2.0, ge=0)
    """Exponent of 1 - p; 0 is plain cross-entropy."""
    detach: bool = False
    """Whether the weight is a constant to the gradient; in the paper it is not."""

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        return mean_over_classes(focal(batch.nll(), self.gamma, self.detach))
