"""The answer of a comparison in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenwise.comparison.formatting import listing, plain, ratio, signed
from tokenwise.comparison.statistics import LEVEL, Interval

if TYPE_CHECKING:
    from tokenwise.comparison.answer import Row

SAME_COST = 0.01
"""Relative costs closer than this are called the same."""
SLOWER = 1.05
"""Relative wall time is mentioned from here on: below, it is noise."""


def answer(
    rows: Sequence[Row],
    baseline: str,
    compared: Sequence[str],
    between: Callable[[Row, Row], Interval | None],
    decimals: int,
) -> tuple[str, str | None]:
    """Say which method to use.

    A method is named only when its value is shown to be below the baseline's and, where it has a random control, below
    that one's too. Among several such methods with no difference shown, the cheaper one is named.

    Args:
        rows: one per method.
        baseline: label of the baseline.
        compared: labels of the methods compared with it.
        between: the difference between two methods of `rows`.
        decimals: how many to give.

    Returns:
        The sentence, and the label it names (None where it names none, or the baseline).
    """
    by_label = {row.label: row for row in rows}
    if not rows:
        return "No answer: nothing has run.", None
    if not any(row.finished for row in rows):
        return f"No answer: every run failed ({_first_reason(rows)}).", None
    base = by_label.get(baseline)
    if base is None or not base.finished:
        why = f" ({_first_reason([base])})" if base else ""
        return f"No answer: no run of the baseline {baseline} finished{why}, so nothing can be compared with it.", None
    if base.verdict == "not finite":
        return f"No answer: the {base.measure.name} of the baseline {baseline} is not finite.", None
    candidates = [by_label[label] for label in compared]
    if not candidates:
        value = plain(base.quality or 0.0, decimals)
        return f"Nothing to choose from: {baseline} ({value} {base.measure.unit}) is the only method.", None

    proven = [row for row in candidates if row.verdict == "better" and row.beats_control]
    if proven:
        best = min(proven, key=_difference)
        rivals = [row for row in proven if row is not best and not _shown_worse(between(row, best))]
        text, winner = _several([best, *rivals], base, decimals) if rivals else (_one(best, base, decimals), best.label)
    else:
        text, winner = _none(candidates, base, decimals), None
    paired = {row.versus_baseline.seeds for row in candidates if row.versus_baseline}
    caveat = " (one seed: how far another would differ is not known)" if paired == {1} else ""
    return f"{text}{caveat}.", winner


def _one(row: Row, base: Row, decimals: int) -> str:
    text = f"Use {row.label}: it lowers {base.measure.name} against {base.label} by {_gain(row, decimals)}"
    if row.versus_baseline:
        low, high = -row.versus_baseline.high, -row.versus_baseline.low
        text += f" ({LEVEL:.0%} interval {plain(low, decimals)} to {plain(high, decimals)})"
    if row.control is not None:
        text += f" and does better than {row.control}, its random control"
    text += f", {_price(row)}"
    if row.failures:
        text += f", though {len(row.failures)} of its {row.planned} runs failed"
    return text


def _several(rows: list[Row], base: Row, decimals: int) -> tuple[str, str]:
    """Methods that all beat the baseline, with no difference shown to the best, which is the first."""
    costs = [row.relative_flops for row in rows if row.relative_flops is not None]
    told_apart = len(costs) == len(rows) and max(costs) - min(costs) >= SAME_COST
    if told_apart:
        rows = sorted(rows, key=lambda row: row.relative_flops or 0.0)
    chosen, others = rows[0], rows[1:]
    gains = listing([plain(-_difference(row), decimals) for row in rows])
    shown = f"lower {base.measure.name} against {base.label} (by {gains} {base.measure.points}), no difference is shown"
    shown += " between them"
    prices = listing([f"{row.label} {_price(row)}" for row in rows])
    if told_apart:
        cheap = "cheaper" if len(rows) == 2 else "cheapest"
        together = listing(["it", *(row.label for row in others)])
        return f"Use {chosen.label}: {together} {shown}, and it is the {cheap} ({prices})", chosen.label
    together = "both" if len(rows) == 2 else "all"
    return f"Use {listing([row.label for row in rows], 'or')}: {together} {shown} ({prices})", chosen.label


def _none(candidates: Sequence[Row], base: Row, decimals: int) -> str:
    """Nothing beats the baseline and its own control."""
    undecided = [row for row in candidates if row.verdict == "no difference"]
    unproven = [row for row in candidates if row.verdict == "better"]
    worse = [f"{row.label} ({_signed(row, decimals)})" for row in candidates if row.verdict == "worse"]
    broken = [f"{row.label} {_BROKEN[row.verdict]}" for row in candidates if row.verdict in _BROKEN]
    parts = []
    if undecided:
        text = f"no difference shown between {listing([base.label, *(row.label for row in undecided)])}"
        only = undecided[0].versus_baseline
        if only and len(undecided) == 1:
            low, high = (signed(value, decimals) for value in (only.low, only.high))
            text += f" ({_signed(undecided[0], decimals)}, {LEVEL:.0%} interval {low} to {high})"
        parts.append(text)
    parts += [_unproven(row, base, decimals) for row in unproven]
    if worse and not parts:
        parts.append(f"use {base.label}: {listing(worse)} {'is' if len(worse) == 1 else 'are'} worse")
    elif worse:
        parts.append(f"{listing(worse)} {'is' if len(worse) == 1 else 'are'} worse than {base.label}")
    if broken:
        parts.append(f"{'' if parts else 'no answer: '}{listing(broken)}")
    text = "; ".join(parts)
    return text[0].upper() + text[1:]


_BROKEN = {
    "failed": "failed in every run",
    "not finite": "ended with a loss that is not finite",
    "not comparable": "finished no seed that the baseline finished",
}


def _unproven(row: Row, base: Row, decimals: int) -> str:
    """Better than the baseline, but not shown to be better than choosing at random."""
    ahead = f"{row.label} is {_gain(row, decimals)} below {base.label}"
    if row.versus_control is None or not row.versus_control.finite:
        return f"no winner shown: {ahead}, but could not be compared with {row.control}, its random control"
    if row.versus_control.above_zero:
        return f"no winner shown: {ahead}, but {row.control}, its random control, is better still"
    return f"no difference shown between {row.label} and {row.control}, its random control, although {ahead}"


def _price(row: Row) -> str:
    if row.relative_flops is None:
        price = "at a cost in FLOPs that was not measured"
    elif abs(row.relative_flops - 1) < SAME_COST:
        price = "at the same FLOPs"
    else:
        price = f"at {ratio(row.relative_flops)} the FLOPs"
    if row.relative_seconds is not None and row.relative_seconds >= SLOWER:
        price += f" and {ratio(row.relative_seconds)} the time"
    return price + (", its reference included" if row.reference_costs is not None else "")


def _difference(row: Row) -> float:
    return row.versus_baseline.mean if row.versus_baseline else 0.0


def _gain(row: Row, decimals: int) -> str:
    return f"{plain(-_difference(row), decimals)} {row.measure.points}"


def _signed(row: Row, decimals: int) -> str:
    return f"{signed(_difference(row), decimals)} {row.measure.points}"


def _shown_worse(interval: Interval | None) -> bool:
    return interval is not None and interval.above_zero


def _first_reason(rows: Sequence[Row]) -> str:
    return next((failure.reason.rstrip(".") for row in rows for failure in row.failures), "no reason was recorded")
