"""Margins for rare classes: a shift of the logits while training that asks more of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.errors import Problem
from tokenwise.method import Card, Paper
from tokenwise.policies.classes import effective_number_weights, fourth_root_margins, log_prior
from tokenwise.weighting.base import State
from tokenwise.weighting.class_weights import Counts, mean_over_classes
from tokenwise.weighting.classification import ClassBatch, ClassObjective, per_class


class LDAM(ClassObjective):
    """Ask for a larger margin of rarer classes (in proportion to ``n^(-1/4)``), and weigh classes late in training.

    With one label per example the margins are scaled so that the rarest class has `max_margin`, and after the share
    `defer` of the training class-balanced weights set in (deferred reweighting). With several labels per example the
    margin of a positive label is ``max_margin * n^(-1/4)``, unscaled, and no class weights follow.
    """

    card: ClassVar[Card] = Card(
        id="weighting/ldam",
        paper=Paper(
            title="Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
            arxiv="1906.07413",
            venue="NeurIPS 2019",
        ),
        needs=("a label for each example",),
        status="VERIFIED",
        checked="LDAM-DRW's loss and class weights, TransICD's multi-label margins, on seeded inputs",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"counts"})
    multi_label: ClassVar[bool] = True
    reduction: ClassVar[str] = "weight_mean"

    max_margin: float = Field(0.5, ge=0)
    """Margin of the rarest class, before `scale`; with several labels the factor of ``n^(-1/4)`` (3.0 in TransICD)."""
    scale: float = Field(1.0, gt=0)
    """Factor of the logits after the margin. The paper has 30 for logits that are cosines; those of a transformers head
    have no such bound."""
    defer: float = Field(0.8, ge=0, le=1)
    """Share of the training before class weights set in; 0 is from the start, 1 never."""
    beta: float = Field(0.9999, ge=0, lt=1)
    """As in `class_balanced`, for the weights that set in."""
    counts: Counts | None = None
    """Examples of each class in the training data; counted there unless given."""

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        assert batch.counts is not None
        logits = batch.logits
        if batch.multi_label:
            # As in TransICD, a class that never occurs gets the margin of one that occurs once.
            margins = self.max_margin * batch.counts.clamp_min(1).pow(-0.25)
            shifted = logits - batch.labels.to(logits.dtype) * margins.to(logits)
            return mean_over_classes(batch.nll(self.scale * shifted))
        margins = fourth_root_margins(batch.counts, self.max_margin).to(logits)
        shift = torch.zeros_like(logits).scatter(1, batch.labels[:, None], per_class(margins, batch.labels)[:, None])
        weights = self._weights(batch.labels, batch.counts, batch.progress)
        return weights.to(logits.dtype) * batch.nll(self.scale * (logits - shift))

    def divisors(self, labels: Tensor, counts: Tensor | None, progress: float) -> Tensor:
        if labels.dim() == 2:
            return super().divisors(labels, counts, progress)
        assert counts is not None
        return self._weights(labels, counts, progress)

    def _weights(self, labels: Tensor, counts: Tensor, progress: float) -> Tensor:
        late = self.defer < 1 and progress >= self.defer
        beta = self.beta if late else 0.0
        return per_class(effective_number_weights(counts, beta), labels)

    def problems(self, counts: Tensor, multi_label: bool) -> list[Problem]:
        return [] if multi_label else super().problems(counts, multi_label)


class LogitAdjustment(ClassObjective):
    """Add ``tau`` times the logarithm of each class's share to its logit while training; evaluate without.

    The classifier then learns what speaks for a class beyond its frequency, which is best for balanced accuracy.
    """

    card: ClassVar[Card] = Card(
        id="weighting/logit_adjustment",
        paper=Paper(title="Long-tail learning via logit adjustment", arxiv="2007.07314", venue="ICLR 2021"),
        needs=("a label for each example",),
        status="VERIFIED",
        checked="the paper's formula on worked numbers: tau 0 and equal counts give plain cross-entropy",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"counts"})

    tau: float = Field(1.0, ge=0)
    """How much of the prior is added; 1 in the paper, 0 is plain cross-entropy."""
    counts: Counts | None = None
    """Examples of each class in the training data; counted there unless given."""

    def losses(self, batch: ClassBatch, state: State | None = None) -> Tensor:
        assert batch.counts is not None
        return batch.nll(batch.logits + self.tau * log_prior(batch.counts).to(batch.logits))
