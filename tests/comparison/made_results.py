"""Results of comparisons that never ran, for the tests of what is made of results."""

from __future__ import annotations

import numpy as np

from tokenwise.comparison.quality import TextLoss
from tokenwise.comparison.records import Costs, Job, Point, Result

TOKENS = np.random.default_rng(1).integers(40, 400, size=30)
LEVELS = np.random.default_rng(2).normal(3.0, 0.3, size=30)


def quality(shift: float, seed: int, noise: float = 0.004) -> TextLoss:
    """Losses of 30 documents, `shift` nats/token above 3; seeds and documents vary as in a real run."""
    common = np.random.default_rng(seed).normal(0, 0.02)
    own = np.random.default_rng([seed, int(abs(shift) * 1e6), shift < 0]).normal(0, noise, size=len(TOKENS) + 1)
    losses = (LEVELS + common + shift + own[0] + own[1:]) * TOKENS
    return TextLoss(losses.tolist(), TOKENS.tolist(), (TOKENS * 3).tolist())


def run(
    label: str,
    seed: int,
    shift: float | None,
    role: str = "candidate",
    control: str | None = None,
    flops: float | None = 1e12,
    reference_flops: float | None = None,
    reason: str = "",
    seconds_comparable: bool = True,
) -> Result:
    """One run; `shift` None makes it a failed one."""
    job = Job("run", label, seed, {label: {"keep": 0.6}}, role, {}, {}, control=control)
    if shift is None:
        return Result(job, "failed", reason or "The loss became NaN at step 7.")
    losses = quality(shift, seed)
    end = losses.nats_per_token
    return Result(
        job,
        "finished",
        quality=losses,
        costs=Costs(flops, 60.0 + seed, 2**30, 1_000_000, 600_000, 500, seconds_comparable),
        reference_costs=None if reference_flops is None else Costs(reference_flops, 15.0, 2**29, 10, 10, 5),
        curve=[Point(k / 4, k, k, None, k, end + (1 - k / 4)) for k in range(5)],
        weights={"kept_share": 0.6},
        example={"tokens": ["def", " x", "\n", "<b>"], "weights": [None, 0.0, 1.0, 1.5]},
        versions={"torch": "2.13.0"},
    )


def method(label: str, shift: float | None, seeds: int = 3, **kind: object) -> list[Result]:
    return [run(label, seed, shift, **kind) for seed in range(seeds)]


def baseline(seeds: int = 3, shift: float | None = 0.0) -> list[Result]:
    return method("uniform", shift, seeds, role="baseline")


def summary(seeds: int = 3) -> dict[str, object]:
    return {
        "task": "language modelling",
        "model": "Llama, 2 layers",
        "data": "train.jsonl",
        "budget": "1,000,000 tokens seen",
        "seeds": list(range(seeds)),
        "baseline": "uniform",
        "plan_file": "plan.yaml",
        "command": "tokenwise compare plan.yaml",
        "folder": "results/plan",
    }
