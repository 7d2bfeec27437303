"""The handle of a weighted training: what it observed, and the correction of its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenwise.method import Handle
from tokenwise.weighting.forward import Weighed, WeightedForward


class Weighing(Handle):
    """A model, or a trainer and its model, training under a method until `undo`.

    Attributes:
        method: the method.
        state: what the run of the method accumulated, or None.
        stats: sums and means over the micro-batches so far: ``labels``, ``labels_trained`` (weight other than zero),
            ``mean_weight``, ``kept_share``, ``effective_sample_size`` (as a share of the labels), ``nll`` (mean
            unweighted loss over the tokens whose loss was computed) and ``nll_labels`` (how many these are).
    """

    def __init__(self, forward: WeightedForward):
        super().__init__()
        self.forward = forward
        self.method = forward.method
        self.state = forward.state
        self._sums = dict.fromkeys(("labels", "labels_trained", "weight", "weight_squared", "nll", "nll_labels"), 0.0)

    @torch.no_grad()
    def observe(self, weighed: Weighed) -> None:
        """Add one micro-batch to `stats`."""
        known = ~weighed.nll.isnan() if weighed.nll.shape == weighed.weights.shape else weighed.weights != 0
        found = torch.stack(
            [
                weighed.weights.count_nonzero().double(),
                weighed.weights.double().sum(),
                weighed.weights.double().square().sum(),
                weighed.nll[known].double().sum(),
                known.sum().double(),
            ]
        ).tolist()
        sums = self._sums
        sums["labels"] += weighed.labels
        for name, value in zip(("labels_trained", "weight", "weight_squared", "nll", "nll_labels"), found, strict=True):
            sums[name] += value
        count = max(sums["labels"], 1)
        self.stats.update(
            labels=sums["labels"],
            labels_trained=sums["labels_trained"],
            mean_weight=sums["weight"] / count,
            kept_share=sums["labels_trained"] / count,
            effective_sample_size=sums["weight"] ** 2 / max(sums["weight_squared"], 1e-30) / count,
            nll=sums["nll"] / max(sums["nll_labels"], 1),
            nll_labels=sums["nll_labels"],
        )

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
