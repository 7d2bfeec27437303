"""The handle of a weighted training: what it observed, and the correction of its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.patch import replace_attribute
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


def check_not_weighed(model: Any) -> None:
    """Refuse a model whose loss another handle makes.

    Raises:
        InputError: naming the way out.
    """
    if hasattr(model.forward, "tokenwise"):
        raise InputError(
            Problem(
                "model", "is weighed already.", "Undo that handle first; two weightings of one loss exclude another."
            )
        )


def replace_forward(
    handle: Weighing,
    weighted: Callable[..., Any],
    labels: Collection[str] = ("labels",),
    columns: Collection[str] = (),
) -> None:
    """Let the handle's model call `weighted` instead of its own forward while it trains; undone with the handle.

    Args:
        handle: the handle, which the new forward carries as its attribute ``tokenwise``.
        weighted: takes what the model takes.
        labels: inputs of which one must be there; without them the model's own forward is called.
        columns: inputs that the model's own forward does not know.
    """
    model = handle.forward.model
    original = model.forward
    active = True

    @functools.wraps(original)
    def forward(*args: Any, **inputs: Any) -> Any:
        if active and model.training and any(inputs.get(name) is not None for name in labels):
            return weighted(*args, **inputs)
        for name in columns:
            inputs.pop(name, None)
        return original(*args, **inputs)

    forward.tokenwise = handle  # type: ignore[attr-defined]
    handle.on_undo(replace_attribute(model, "forward", forward))

    def stop() -> None:
        nonlocal active
        active = False
        del forward.tokenwise  # type: ignore[attr-defined]

    handle.on_undo(stop)
