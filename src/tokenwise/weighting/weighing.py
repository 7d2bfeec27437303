"""The handle of a weighted training: what it observed, and the correction of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenwise.method import Handle
from tokenwise.weighting.diagnostics import WeightSums, measure
from tokenwise.weighting.forward import Weighed, WeightedForward


class Weighing(Handle):
    """A model, or a trainer and its model, training under a method until `undo`.

    Attributes:
        method: the method.
        state: what the run of the method accumulated, or None.
        stats: sums and means over the micro-batches so far: ``labels``, ``labels_trained`` (weight other than zero),
            ``mean_weight``, ``kept_share``, ``effective_sample_size`` (as a share of the labels), ``nll`` (mean
            unweighted loss over the tokens whose loss was computed), ``nll_labels`` (how many these are),
            ``effective_learning_rate`` (the sum of the absolute weights over the denominator; under ``sequence_mean``
            each weight over its sequence's length: how large the steps are relative to uniform weights, 1 with
            ``normalize="mean"``), and
            ``gradient_share_decile_1`` to ``_10``: of the gradient at the logits, the share held by the tenth of
            the tokens with the smallest weights in their micro-batch, to that with the largest; see
            `tokenwise.weighting.diagnostics.gradient_by_decile`. All speak of this process alone.
    """

    def __init__(self, forward: WeightedForward):
        super().__init__()
        self.forward = forward
        self.method = forward.method
        self.state = forward.state
        self._sums, self._interval = WeightSums(), WeightSums()

    @torch.no_grad()
    def observe(self, weighed: Weighed) -> None:
        """Add one micro-batch to `stats`."""
        measured = measure(weighed).tolist()
        for sums in (self._sums, self._interval):
            sums.add(weighed.labels, measured)
        self.stats.update(self._sums.summary())

    def take_interval(self) -> dict[str, float]:
        """What `stats` would say of the micro-batches since the last call alone; empty where there was none."""
        interval, self._interval = self._interval, WeightSums()
        return interval.summary()

    def correct_gradients(self, num_items_in_batch: Tensor | int) -> float:
        """Turn gradients divided by the number of labels into gradients divided by the method's own denominator.

        For loops that accumulate gradients: call it after the last backward of the step, before clipping, with the
        number that every ``model(..., num_items_in_batch=...)`` of the step was given. (On a Trainer this happens by
        itself.) Methods whose denominator is the number of labels need no correction and get none.

        Returns:
            The factor the gradients were multiplied by.
        """
        pending, self.forward.pending = self.forward.pending, None
        if pending is None:
            return 1.0
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(pending)
        factor = float(num_items_in_batch) / float(pending) if pending else 1.0
        gradients = [p.grad for p in self.forward.model.parameters() if p.grad is not None]
        if gradients and factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return factor
