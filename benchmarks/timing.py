"""Interleaved timing: each round runs every contestant once, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one round that is not counted.

    On a machine with other work, `time.process_time` as the clock counts the processor's time of this process alone.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for counted in range(-1, rounds):
        # The order turns, and runs backwards every second time: nobody always follows the same other one, whose freed
        # memory may fit well or badly.
        turn = counted % len(names)
        for name in (names[turn:] + names[:turn])[:: 1 if counted % 2 else -1]:
            run = contestants[name]
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if counted >= 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))


def table(seconds: dict[str, list[float]], against: list[str]) -> str:
    """A Markdown table: median seconds, and the ratio to each of `against`."""
    lines = [
        "| | median s | " + " | ".join(f"/ {name}" for name in against) + " |",
        "|---|---|" + "---|" * len(against),
    ]
    for name, values in seconds.items():
        ratios = " | ".join(f"{ratio(seconds, name, other):.2f}" for other in against)
        lines.append(f"| {name} | {statistics.median(values):.3f} | {ratios} |")
    return "\n".join(lines)
