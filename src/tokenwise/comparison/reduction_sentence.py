"""The answer of a comparison at several budgets: which method to use at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenwise.comparison.formatting import budget, listing, plain, ratio, signed
from tokenwise.comparison.sentence import SAME_COST
from tokenwise.comparison.statistics import Interval

if TYPE_CHECKING:
    from tokenwise.comparison.answer import Row


@dataclass(frozen=True)
class _Part:
    """What is said of one budget, in one way of running: the methods to use, their series, and the words."""

    share: float
    unit: str
    way: str
    labels: tuple[str, ...]
    series: tuple[str, ...]
    text: str

    @property
    def budget(self) -> str:
        return _budgets([self])

    @property
    def name(self) -> str:
        """The budget and the way, at the start of a line."""
        text = self.budget + (f", question {self.way}" if self.way else "")
        return text[:1].upper() + text[1:]


def answer_by_budget(
    rows: Sequence[Row],
    baseline: str,
    between: Callable[[Row, Row], Interval | None],
    decimals: int,
    unit: str,
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Say which method to use at each budget.

    A method is named only when it is shown to be better than its random control, and no other control of the budget,
    which drops elsewhere, is shown to be better than it. Among several with no difference
    shown to the best, the cheapest is named where costs tell them apart, else all.

    Args:
        rows: one per method and budget, and the baseline.
        baseline: label of the baseline.
        between: the difference between two of `rows`.
        decimals: how many to give.
        unit: what budgets are of: ``keep``, ``flops``, ``tokens`` or ``bytes``.

    Returns:
        The sentence, one for each budget with the numbers behind it, and the labels they name.
    """
    base = next((row for row in rows if row.label == baseline), None)
    reasons = [failure.reason.rstrip(".") for row in rows for failure in row.failures]
    because = f" ({reasons[0]})" if reasons else ""
    if base is None or not base.finished:
        return (
            f"No answer: no run of the baseline {baseline} finished{because}, so nothing can be compared with it.",
            (),
            (),
        )
    run = [row for row in rows if row.share is not None and row.label != baseline]
    shares = sorted({row.share for row in run if row.share is not None}, reverse=True)
    ways = list(dict.fromkeys(row.way for row in run))
    parts = []
    for way in ways:
        for share in shares:
            here = [row for row in run if (row.share, row.way) == (share, way)]
            # The way is said once for all of them.
            here = [replace(row, series=row.series.removesuffix(f" {way}")) for row in here]
            parts.append(_Part(share, unit, way if len(ways) > 1 else "", *_at(here, base, between, decimals)))
    if not parts:
        return f"Nothing to choose from: {baseline} is the only method.", (), ()
    points = tuple(f"{part.name}: {part.text}." for part in parts)
    named = tuple(label for part in parts for label in part.labels)
    if len(ways) == 1:
        text = _said(parts)
        return f"{text[:1].upper()}{text[1:]}.", points, named
    texts = [f"ith the question {way}, {_said([part for part in parts if part.way == way])}" for way in ways]
    return f"W{'; w'.join(texts)}.", points, named


def _said(parts: Sequence[_Part]) -> str:
    """What to use at some budgets."""
    budgets = _budgets(parts)
    if not any(part.labels for part in parts):
        return f"no method is shown to be better than chance at {budgets}"
    if len({part.series for part in parts}) == 1:
        return f"use {listing(parts[0].series, 'or')} at {budgets}"
    clear = [f"{listing(part.series, 'or')} at {part.budget}" for part in parts if part.labels]
    unclear = [part for part in parts if not part.labels]
    rest = f"; at {_budgets(unclear)} no method is shown to be better than chance" if unclear else ""
    return f"use {listing(clear)}{rest}"


def _budgets(parts: Sequence[_Part]) -> str:
    """``keep 0.75, 0.5 and 0.25``."""
    unit = parts[0].unit
    shares = listing([budget(unit, part.share) for part in parts])
    return {"keep": f"keep {shares}", "flops": f"{shares} of the FLOPs"}.get(unit, shares)


def _at(
    rows: list[Row],
    base: Row,
    between: Callable[[Row, Row], Interval | None],
    decimals: int,
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """At one budget: the labels and the series to use, and why."""
    sound = [row for row in rows if row.finished and row.verdict not in ("failed", "not finite")]
    finished = [row for row in sound if row.role == "candidate"]
    if not finished:
        return (), (), "no run finished"
    losers = [row.series for row in finished if row.versus_control is not None and row.versus_control.above_zero]
    lost = f"; {listing(losers)} {'does' if len(losers) == 1 else 'do'} worse than chance" if losers else ""
    proven = [row for row in finished if row.beats_control]
    chance = [row for row in sound if row.role == "control"] if len({row.control for row in finished}) > 1 else []
    better = {row.label: [other.series for other in chance if _worse(between(row, other))] for row in proven}
    beaten = [row for row in proven if better[row.label]]
    if beaten:
        proven = [row for row in proven if row not in beaten]
        names = listing(list(dict.fromkeys(name for row in beaten for name in better[row.label])))
        lost += f"; chance elsewhere ({names}) does better than {listing([row.series for row in beaten])}"
    if not proven:
        best = min(finished, key=lambda row: row.quality or 0.0)
        control = f" ({best.control})" if best.control else ""
        unproven = "" if best in beaten else f"no difference shown to chance{control}, with "
        text = f"{unproven}{best.series} {'is ' if best in beaten else ''}ahead ({_price(best, base, decimals)}){lost}"
        return (), (), text
    best = min(proven, key=lambda row: row.quality or 0.0)
    rivals = [row for row in proven if row is not best and not _worse(between(row, best))]
    chosen = [best, *rivals]
    costs = [row.relative_flops for row in chosen]
    known = [cost for cost in costs if cost is not None]
    why = ""
    if rivals and len(known) == len(chosen) and max(known) - min(known) >= SAME_COST:
        cheapest = min(chosen, key=lambda row: row.relative_flops or 0.0)
        others = listing([row.series for row in chosen if row is not cheapest])
        why = f", the cheaper one, as no difference is shown to {others}"
        chosen = [cheapest]
    elif rivals:
        why = ", no difference shown between them"
    texts = [f"{row.series}{why if len(chosen) == 1 else ''} ({_price(row, base, decimals)})" for row in chosen]
    text = listing(texts, "or") + (why if len(chosen) > 1 else "") + lost
    return tuple(row.label for row in chosen), tuple(row.series for row in chosen), text


def _worse(interval: Interval | None) -> bool:
    return interval is not None and interval.above_zero


def _price(row: Row, base: Row, decimals: int) -> str:
    """What a method costs in quality, and saves."""
    parts = []
    if row.versus_baseline is not None:
        shown = "" if row.verdict in ("better", "worse") else ", no difference shown"
        unit = "points" if row.measure.points == "percentage points" else row.measure.points
        parts.append(f"{row.measure.name} {signed(row.versus_baseline.mean, decimals)} {unit} to {base.label}{shown}")
    else:
        parts.append(f"{row.measure.name} {plain(row.quality or 0.0, decimals)}")
    if row.costs.cache_bytes is not None and row.costs.full_cache_bytes:
        parts.append(f"{ratio(row.costs.cache_bytes / row.costs.full_cache_bytes)} the bytes")
    if row.relative_flops is not None:
        parts.append(f"{ratio(row.relative_flops)} the FLOPs")
    if row.relative_seconds is not None:
        parts.append(f"{ratio(row.relative_seconds)} the time")
    return ", ".join(parts)
