"""What a run spends: steps, tokens, operations, time and memory, against its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from tokenwise.comparison.memory import PeakMemory
from tokenwise.comparison.records import Costs


class Spending:
    """What a run has spent so far, and which share of its budget that is.

    Time and memory are measured between `resume` and `pause` only.

    Args:
        budget: ``{"unit": "steps" | "tokens_seen" | "tokens_trained" | "flops", "amount": ...}``.
        flops: gives the operations spent so far.
        stats: where ``labels`` and ``labels_trained`` are being counted; the latter is not measured where it is not.
        device: where the model is.
    """

    def __init__(
        self, budget: dict[str, Any], flops: Callable[[], float], stats: dict[str, float], device: torch.device
    ) -> None:
        self._budget = budget
        self._flops = flops
        self._stats = stats
        self._device = device
        self._memory = PeakMemory(device)
        self._seconds = 0.0
        self._resumed_at: float | None = None
        self.steps = 0

    @property
    def share(self) -> float:
        """Share of the budget spent; the last step may take it above 1."""
        spent = self._amounts()[self._budget["unit"]]
        return float(spent / self._budget["amount"])

    def _amounts(self) -> dict[str, float]:
        return {
            "steps": self.steps,
            "flops": self._flops(),
            "tokens_seen": self._stats.get("labels", 0),
            "tokens_trained": self._stats.get("labels_trained", 0),
        }

    @property
    def training_loss(self) -> tuple[float, float]:
        """Sum of the unweighted training losses computed so far, in nats, and of how many tokens."""
        count = self._stats.get("nll_labels", 0.0)
        return self._stats.get("nll", 0.0) * count, count

    def costs(self) -> Costs:
        """Everything spent so far."""
        amounts = self._amounts()
        return Costs(
            flops=float(amounts["flops"]),
            wall_seconds=self.seconds,
            peak_memory_bytes=self._memory.peak,
            tokens_seen=round(amounts["tokens_seen"]),
            tokens_trained=round(amounts["tokens_trained"]) if "labels_trained" in self._stats else None,
            steps=self.steps,
        )

    def resume(self) -> None:
        """Let time run and memory count."""
        self._memory.resume()
        self._resumed_at = self._now()

    def pause(self) -> None:
        """Stop both."""
        self._seconds, self._resumed_at = self.seconds, None
        self._memory.pause()

    @property
    def seconds(self) -> float:
        """Time between `resume` and `pause` so far."""
        return self._seconds + (0.0 if self._resumed_at is None else self._now() - self._resumed_at)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def learning_rate_factor(share: float, warmup: float, schedule: str) -> float:
    """What the learning rate is multiplied with once `share` of the budget is spent.

    Args:
        share: at least 0; everything from 1 on counts as 1.
        warmup: the share in [0, 1) over which it rises linearly from 0 to 1.
        schedule: what follows: ``constant``, or down to zero, ``linear`` or along a half ``cosine``.
    """
    if share < warmup:
        return share / warmup
    left = (1 - min(share, 1.0)) / (1 - warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[schedule]
