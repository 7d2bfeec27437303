"""Which one should I use? The results of a comparison, concluded in rows and one sentence."""

from __future__ import annotations

import math
import statistics as descriptive
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from tokenwise.comparison.formatting import decimals_for
from tokenwise.comparison.quality import Measure, Quality
from tokenwise.comparison.records import Costs, Result
from tokenwise.comparison.reduction_sentence import answer_by_budget
from tokenwise.comparison.sentence import answer
from tokenwise.comparison.statistics import LEVEL, Interval, difference

FEW_ITEMS = 20
OVER = 0.02
"""A method that keeps so much more than its budget says is told."""
OFF = 0.15
"""A method that reads so much more or less than its budget says, as a share of it, is told."""
_NOTHING = Measure("held-out quality", "")
"""What is measured where nothing has been."""

Verdict = Literal["baseline", "better", "worse", "no difference", "not finite", "not comparable", "failed"]


@dataclass(frozen=True)
class Failure:
    """A run (or the training of a reference) that did not finish."""

    label: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Row:
    """What a comparison found out about one method.

    Args:
        label: its name in the comparison.
        role: as in `Job`.
        settings: its hyper-parameters, by name.
        finished: the seeds whose run finished.
        planned: how many runs there were to be.
        measure: what the quality is, and its unit.
        quality: held-out quality, mean over finished seeds; lower is better. None when no run finished.
        spread: standard deviation of it between seeds; None below two seeds.
        lowest: smallest value of a seed.
        highest: largest value of a seed.
        details: further measures, means over finished seeds.
        groups: measures of parts (of each class), means over finished seeds.
        versus_baseline: method minus baseline; None for the baseline, and where no seed was finished by both.
        control: label of the random control, or None.
        versus_control: method minus control, or None.
        verdict: against the baseline alone.
        costs: means over finished seeds (peak memory: the largest), the reference's apart.
        reference_costs: what training its reference cost, or None without one.
        relative_flops: FLOPs with the reference's, over the baseline's; None where either is not measured.
        relative_seconds: the same of the wall time; None also where it is not comparable.
        relative_decode_seconds: the same of the time of writing a token.
        failures: the runs that failed.
        share: the budget it was run at, where the comparison has several: in (0, 1], or an amount.
        unit: what that budget is of.
        series: its name without the budget.
        way: the way in which it was run, where the comparison has several.
    """

    label: str
    role: Literal["baseline", "control", "candidate"]
    settings: dict[str, Any]
    finished: tuple[int, ...]
    planned: int
    measure: Measure
    quality: float | None
    spread: float | None
    lowest: float | None
    highest: float | None
    details: dict[Measure, float]
    groups: dict[str, dict[Measure, float]]
    versus_baseline: Interval | None
    control: str | None
    versus_control: Interval | None
    verdict: Verdict
    costs: Costs
    reference_costs: Costs | None
    relative_flops: float | None
    relative_seconds: float | None
    failures: tuple[Failure, ...]
    share: float | None = None
    unit: str = ""
    series: str = ""
    way: str = ""
    relative_decode_seconds: float | None = None

    @property
    def beats_control(self) -> bool:
        """Whether it is shown to be better than its random control, or needs none."""
        return self.control is None or (self.versus_control is not None and self.versus_control.below_zero)


@dataclass(frozen=True)
class Conclusion:
    """The answer of a comparison.

    Args:
        sentence: the answer to "which one should I use?".
        winner: the label it names, or None; None also where it names one for each budget.
        chosen: the labels it names.
        points: what stands behind it, a sentence for each budget where there are several.
        remarks: what belongs to it, in whole sentences: what is lost at these budgets, and which one loses nothing.
        baseline: label of the baseline.
        rows: one per method, the baseline first.
        failures: every run and reference that failed.
        level: of each interval, corrected for the number of methods compared.
        compared: how many methods were compared with the baseline.
        seeds: how many seeds were planned.
        measure: what methods are ranked by; lower is better.
        curve_measure: what was measured on the way.
        brief: those of the rows' `details` that belong into a small table.
        held_out: how much was measured on, in words; empty where nothing was.
        item: what one held-out item is called.
        decimals: how many decimals differences deserve.
        notes: what a reader must know of these numbers, one sentence each.
        family: the family of the methods, which decides what the costs are of.
    """

    sentence: str
    winner: str | None
    baseline: str
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    level: float
    compared: int
    seeds: int
    measure: Measure
    curve_measure: Measure
    brief: tuple[Measure, ...]
    held_out: str
    item: str
    decimals: int
    notes: tuple[str, ...]
    chosen: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    family: str = "weighting"

    @property
    def answer(self) -> str:
        """The sentence with its remarks."""
        return " ".join([self.sentence, *self.remarks])

    @property
    def trains(self) -> bool:
        """Whether its runs train a model; else they measure a trained one, each method at several budgets."""
        return self.family == "weighting"

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which methods were run, where there are several."""
        found = tuple(dict.fromkeys(row.way for row in self.rows if row.role != "baseline"))
        return found if len(found) > 1 else ()

    @property
    def seconds_comparable(self) -> bool:
        """Whether no run had another beside it while it was timed."""
        costs = [cost for row in self.rows for cost in (row.costs, row.reference_costs) if cost is not None]
        return all(cost.seconds_comparable for cost in costs)


def conclude(results: Sequence[Result], plan_summary: Mapping[str, Any]) -> Conclusion:
    """Conclude a comparison.

    Args:
        results: of every job, in the plan's order; references may be among them.
        plan_summary: ``baseline`` (its label), ``seeds`` and, where it is there, ``family`` are read.

    Raises:
        ValueError: when runs were evaluated on different held-out items.
    """
    baseline = plan_summary["baseline"]
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.job.kind == "run":
            groups.setdefault(result.job.label, []).append(result)
    groups = dict(sorted(groups.items(), key=lambda item: item[0] != baseline))  # stable: the plan's order otherwise
    roles = {label: group[0].job.role for label, group in groups.items()}
    compared = [label for label, role in roles.items() if role == "candidate"]
    compared = compared or [label for label in groups if label != baseline]
    level = 1 - (1 - LEVEL) / max(len(compared), 1)
    planned = len(plan_summary["seeds"])
    known = next((result.quality for group in groups.values() for result in group if result.quality), None)
    measure = known.measure if known else _NOTHING
    rows = tuple(_row(group, groups, baseline, level, planned, measure) for group in groups.values())
    intervals = [i for row in rows for i in (row.versus_baseline, row.versus_control) if i is not None]
    decimals = decimals_for((interval.high - interval.low) / 2 for interval in intervals)

    def between(first: Row, second: Row) -> Interval | None:
        return _difference(groups[first.label], groups[second.label], level)

    family = plan_summary.get("family", "weighting")
    if family != "weighting":
        unit = next((result.job.budget["unit"] for result in results), "keep")
        sentence, remarks, points, chosen = answer_by_budget(rows, baseline, between, decimals, unit)
        winner = None
    else:
        sentence, winner = answer(rows, baseline, compared, between, decimals)
        chosen, points, remarks = () if winner is None else (winner,), (), ()
    return Conclusion(
        sentence=sentence,
        winner=winner,
        baseline=baseline,
        rows=rows,
        failures=tuple(_failure(result) for result in results if result.status == "failed"),
        level=level,
        compared=len(compared),
        seeds=planned,
        measure=measure,
        curve_measure=known.curve_measure if known else _NOTHING,
        brief=known.brief if known else (),
        held_out=known.held_out if known else "",
        item=known.item if known else "item",
        decimals=decimals,
        notes=tuple(_notes(rows, level, len(compared), known, planned)),
        chosen=chosen,
        points=points,
        remarks=remarks,
        family=family,
    )


def _row(
    group: list[Result], groups: dict[str, list[Result]], baseline: str, level: float, planned: int, measure: Measure
) -> Row:
    job = group[0].job
    finished = [result for result in group if result.status == "finished"]
    qualities = [result.quality for result in finished if result.quality]
    losses = [quality.value if quality.finite else math.nan for quality in qualities]
    versus_baseline = None if job.label == baseline else _difference(group, groups.get(baseline, []), level)
    versus_control = _difference(group, groups.get(job.control, []), level) if job.control is not None else None
    baseline_costs = _own_costs(groups.get(baseline, []))
    costs, reference_costs = _on_scale(_own_costs(group), baseline_costs), _reference_costs(group)
    return Row(
        label=job.label,
        role=job.role,
        settings=dict(next(iter(job.method.values()), None) or {}),
        finished=tuple(result.job.seed for result in finished),
        planned=max(planned, len(group)),
        measure=measure,
        quality=descriptive.fmean(losses) if losses else None,
        spread=_deviation(losses) if job.draws else None,  # one run that stands for every seed
        lowest=min(losses, default=None),
        highest=max(losses, default=None),
        details=_means([quality.details for quality in qualities]),
        groups={
            name: _means([quality.groups[name] for quality in qualities])
            for name in (qualities[0].groups if qualities else ())
        },
        versus_baseline=versus_baseline,
        control=job.control,
        versus_control=versus_control,
        verdict=_verdict(losses, job.label == baseline, versus_baseline),
        costs=costs,
        reference_costs=reference_costs,
        relative_flops=_relative("flops", costs, reference_costs, baseline_costs),
        relative_seconds=_relative("wall_seconds", costs, reference_costs, baseline_costs),
        failures=tuple(_failure(result) for result in group if result.status == "failed"),
        share=job.budget.get("share"),
        unit=job.budget.get("unit", ""),
        series=job.series or job.label,
        way=job.budget.get("way", ""),
        relative_decode_seconds=_relative("decode_seconds", costs, reference_costs, baseline_costs),
    )


def _means(measured: list[dict[Measure, float]]) -> dict[Measure, float]:
    if not measured:
        return {}
    return {measure: descriptive.fmean(values[measure] for values in measured) for measure in measured[0]}


def _verdict(losses: list[float], is_baseline: bool, interval: Interval | None) -> Verdict:
    if not losses:
        return "failed"
    if not math.isfinite(sum(losses)):
        return "not finite"
    if is_baseline:
        return "baseline"
    if interval is None or not interval.finite:
        return "not comparable"
    if interval.below_zero:
        return "better"
    return "worse" if interval.above_zero else "no difference"


def _failure(result: Result) -> Failure:
    reference = result.job.kind == "reference"
    label = f"reference {result.job.label}" if reference else result.job.label
    return Failure(label, result.job.seed, result.reason or "no reason was recorded")


def _deviation(losses: list[float]) -> float | None:
    """Standard deviation between seeds, NaN where a loss is not finite, None below two."""
    if len(losses) < 2:
        return None
    return descriptive.stdev(losses) if math.isfinite(sum(losses)) else math.nan


def _difference(group: list[Result], others: list[Result], level: float) -> Interval | None:
    runs, baselines = _qualities(group), _qualities(others)
    return difference(runs, baselines, level) if runs.keys() & baselines.keys() else None


def _qualities(group: list[Result]) -> dict[int, Quality]:
    finished = (result for result in group if result.status == "finished")
    return {result.job.seed: result.quality for result in finished if result.quality is not None}


def _own_costs(group: list[Result]) -> Costs:
    return _mean_costs([result.costs for result in group if result.status == "finished"])


def _reference_costs(group: list[Result]) -> Costs | None:
    charged = [result.reference_costs for result in group if result.status == "finished"]
    found = [costs for costs in charged if costs is not None]
    return _mean_costs(found) if found else None


def _mean_costs(costs: list[Costs]) -> Costs:
    """Means (the largest for peak memory); what one run did not measure is not measured."""

    def mean(name: str) -> Any:
        values = [getattr(cost, name) for cost in costs]
        return None if not values or None in values else descriptive.fmean(values)

    def whole(name: str) -> int | None:
        value = mean(name)
        return None if value is None else round(value)

    whole_numbers = ("tokens_seen", "tokens_trained", "steps")
    apart = ("peak_memory_bytes", "seconds_comparable", *whole_numbers)
    peaks = [cost.peak_memory_bytes for cost in costs]
    known_peaks = [peak for peak in peaks if peak is not None]
    return Costs(
        **{entry.name: mean(entry.name) for entry in fields(Costs) if entry.name not in apart},
        **{name: whole(name) for name in whole_numbers},
        peak_memory_bytes=max(known_peaks) if peaks and len(known_peaks) == len(peaks) else None,
        seconds_comparable=all(cost.seconds_comparable for cost in costs),
    )


def _on_scale(costs: Costs, baseline: Costs) -> Costs:
    """Costs with their times scaled as if the dense model had taken as long beside it as in the baseline's run."""
    pairs = (
        ("dense_seconds", "wall_seconds", "scoring_seconds"),
        ("full_decode_seconds", "decode_seconds", "decode_scoring_seconds"),
    )
    scaled: dict[str, Any] = {}
    for dense, *names in pairs:
        beside, wanted = getattr(costs, dense), getattr(baseline, dense)
        if beside and wanted:
            own = {name: getattr(costs, name) for name in names}
            scaled |= {name: value / beside * wanted for name, value in own.items() if value is not None}
    return replace(costs, **scaled)


def _relative(name: str, costs: Costs, reference: Costs | None, baseline: Costs) -> float | None:
    parts = [costs] if reference is None else [costs, reference]
    values: list[float | None] = [getattr(part, name) for part in parts]
    known = [value for value in values if value is not None]
    unit: float | None = getattr(baseline, name)
    if not unit or len(known) < len(values):
        return None
    if name.endswith("seconds") and not all(part.seconds_comparable for part in (*parts, baseline)):
        return None
    return sum(known) / unit


def _off_budget(row: Row) -> str:
    """What a method that reads some of what it stores reads, where that is not about its budget; else nothing."""
    read, before = row.costs.tokens_read, row.costs.tokens_before
    if read is None or before is None or row.share is None:
        return ""
    budget = row.share * before if row.unit == "keep" else row.share
    about = abs(read - budget) <= OFF * budget
    return "" if about else f"{row.label} reads {read:.0f} tokens of a budget of {budget:.0f}"


def _notes(rows: Sequence[Row], level: float, compared: int, known: Quality | None, planned: int) -> list[str]:
    """What a reader must know of these numbers, in whole sentences."""
    if known is None or not any(row.versus_baseline for row in rows):
        return []
    notes = []
    if compared > 1:
        notes.append(
            f"Each interval is at {level:.1%}, which makes {LEVEL:.0%} for the {compared} methods compared together "
            "(Bonferroni)."
        )
    if all(row.versus_baseline.seeds == 1 for row in rows if row.versus_baseline):
        notes.append(f"With one seed only the held-out {known.item}s are resampled: nothing is known of other seeds.")
    two = [row.label for row in rows if row.versus_baseline and row.versus_baseline.seeds == 2]
    if two:
        which = "" if len(two) == sum(row.versus_baseline is not None for row in rows) else f" ({', '.join(two)})"
        notes.append(f"Two seeds{which} say little of a third, so intervals are wide; three tell far more.")
    strata = known.strata()
    fewest = known.items if strata is None else int(min(np.unique(strata, return_counts=True)[1]))
    if strata is not None and fewest < FEW_ITEMS:
        notes.append(
            f"The {known.smallest} has {fewest} held-out {known.item}{'s' if fewest > 1 else ''}: intervals may be too "
            f"narrow; use {FEW_ITEMS} or more of each."
        )
    elif fewest == 1:
        notes.append(f"There is one held-out {known.item}: nothing is known of other {known.item}s.")
    elif fewest < FEW_ITEMS:
        notes.append(f"With {fewest} held-out {known.item}s intervals may be too narrow; use {FEW_ITEMS} or more.")
    evicting = [row for row in rows if row.costs.tokens_read is None]
    beyond = [
        f"{row.label} keeps {row.costs.token_share:.0%}"
        for row in evicting
        if row.share is not None and row.unit == "keep" and (row.costs.token_share or 0.0) > row.share + OVER
    ]
    if beyond:
        notes.append(f"Some methods could not go as low as the budget says on this model: {', '.join(beyond)}.")
    off = [text for row in rows if (text := _off_budget(row))]
    if off:
        notes.append(
            f"Whole pages, and layers that read all, are not on equal terms with the others: {', '.join(off)}."
        )
    same = [row.versus_baseline for row in rows if row.role == "candidate" and row.verdict == "no difference"]
    if known.measure.unit == "%" and any(interval and interval.low == interval.high for interval in same):
        unseen = -100 * math.log(1 - level) / fewest
        notes.append(
            f"An interval of no width: not one of the {known.items} held-out {known.item}s came out otherwise. Up to "
            f"{unseen:.1g} percentage points of difference could still have been missed."
        )
    undecided = [row.versus_baseline for row in rows if row.verdict == "no difference" and row.role == "candidate"]
    widest = max(((interval.high - interval.low) / 2 for interval in undecided if interval), default=0.0)
    if math.isfinite(widest) and widest > 0:
        notes.append(
            f"No difference shown does not mean none: one below about {widest:.2g} {known.measure.points} could hide "
            f"in these intervals; more seeds and more held-out {known.item}s narrow them."
        )
    unfinished = [f"{row.label} {len(row.finished)} of {row.planned}" for row in rows if len(row.finished) < planned]
    if unfinished:
        notes.append(f"Not every run finished ({', '.join(unfinished)}): only seeds finished by both are compared.")
    return notes
