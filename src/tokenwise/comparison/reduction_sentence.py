"""The answer of a comparison at several budgets: which method to use at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from tokenwise.comparison.formatting import budget, listing, plain, ratio, signed
from tokenwise.comparison.sentence import SAME_COST
from tokenwise.comparison.statistics import Interval

if TYPE_CHECKING:
    from tokenwise.comparison.answer import Row


@dataclass(frozen=True)
class _Part:
    """What is said of one budget, in one way of running.

    Args:
        share: the budget.
        unit: what it is of.
        way: the way, where there are several.
        stored: whether all stays stored and less of it is read, where there are methods of both kinds.
        rows: of the methods, without controls.
        labels: of the methods to use.
        series: their names.
        text: why, in words.
    """

    share: float
    unit: str
    way: str
    stored: bool
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    series: tuple[str, ...]
    text: str

    @property
    def budget(self) -> str:
        return _budgets([self])

    @property
    def name(self) -> str:
        """The budget and the way, at the start of a line."""
        text = self.budget + (f", question {self.way}" if self.way else "") + (", all stored" if self.stored else "")
        return text[:1].upper() + text[1:]

    @property
    def where(self) -> str:
        """The way, behind a budget."""
        return f" with the question {self.way}" * bool(self.way) + " and all stored" * self.stored

    @property
    def best(self) -> Row | None:
        """The best of the methods to use where all of them are shown to be worse than the baseline; else None."""
        rows = [row for row in self.rows if row.label in self.labels]
        return min(rows, key=lambda row: row.quality or 0.0) if _all_worse(rows) else None

    @property
    def enough(self) -> Row | None:
        """The best method that is not shown to be worse than the baseline."""
        rows = [row for row in self.rows if row.verdict in ("better", "no difference")]
        return min(rows, key=lambda row: row.quality or 0.0, default=None)


def answer_by_budget(
    rows: Sequence[Row],
    baseline: str,
    between: Callable[[Row, Row], Interval | None],
    decimals: int,
    unit: str,
) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Say which method to use at each budget.

    A method is named only when it is shown to be better than its random control, and no other control of the budget,
    which drops elsewhere, is shown to be better than it. Among several with no difference
    shown to the best, the cheapest is named where costs tell them apart, else all. Methods that store everything and
    read less of it are no rivals of those that store less: they are named apart. Where what is named is shown to be
    worse than the baseline, a remark says how much of its quality is left.

    Args:
        rows: one per method and budget, and the baseline.
        baseline: label of the baseline.
        between: the difference between two of `rows`.
        decimals: how many to give.
        unit: what budgets are of: ``keep``, ``flops``, ``tokens`` or ``bytes``.

    Returns:
        The sentence, the remarks that belong to it, a sentence for each budget with the numbers behind it, and the
        labels they name.
    """
    base = next((row for row in rows if row.label == baseline), None)
    reasons = [failure.reason.rstrip(".") for row in rows for failure in row.failures]
    because = f" ({reasons[0]})" if reasons else ""
    if base is None or not base.finished:
        return (
            f"No answer: no run of the baseline {baseline} finished{because}, so nothing can be compared with it.",
            (),
            (),
            (),
        )
    run = [row for row in rows if row.share is not None and row.label != baseline]
    shares = sorted({row.share for row in run if row.share is not None}, reverse=True)
    ways = list(dict.fromkeys(row.way for row in run))
    reading = [row for row in run if row.costs.tokens_read is not None]
    kinds = [False, True] if 0 < len(reading) < sum(row.role == "candidate" for row in run) else [False]
    parts = []
    for way in ways:
        for share, stored in product(shares, kinds):
            here = [row for row in run if (row.share, row.way) == (share, way)]
            if len(kinds) > 1:
                here = [row for row in here if row.role == "control" or (row in reading) == stored]
            # The way is said once for all of them.
            here = [replace(row, series=row.series.removesuffix(f" {way}")) for row in here]
            candidates = tuple(row for row in here if row.role == "candidate")
            found = _at(here, base, between, decimals)
            parts.append(_Part(share, unit, way if len(ways) > 1 else "", stored, candidates, *found))
    if not parts:
        return f"Nothing to choose from: {baseline} is the only method.", (), (), ()
    points = tuple(f"{part.name}: {part.text}." for part in parts)
    named = tuple(label for part in parts for label in part.labels)
    remarks = [f"To store all and read less of it: {_by_way([part for part in parts if part.stored])}."] * len(
        kinds[1:]
    )
    remarks += _worse_than(parts, base, decimals)
    if len(shares) > 1:
        remarks.append(_smallest(parts, base, decimals))
    text = _by_way([part for part in parts if not part.stored])
    return f"{text[:1].upper()}{text[1:]}.", tuple(remarks), points, named


def _by_way(parts: Sequence[_Part]) -> str:
    """What to use with each way."""
    texts = []
    for way in dict.fromkeys(part.way for part in parts):
        text = _said([part for part in parts if part.way == way])
        texts.append(f"with the question {way}, {text}" if way else text)
    return "; ".join(texts)


def _worse_than(parts: Sequence[_Part], base: Row, decimals: int) -> list[str]:
    """Where even the best methods are shown to be worse than the baseline: what is left of its quality."""
    texts = [
        f"at {part.budget}{part.where} {part.best.series} {_left(part.best, base, decimals)}"
        for part in parts
        if part.best is not None
    ]
    return [f"Even so worse than {base.label}: {'; '.join(texts)}."] if texts else []


def _left(row: Row, base: Row, decimals: int) -> str:
    """What a method leaves of the baseline's quality, with the interval."""
    interval = row.versus_baseline
    assert interval is not None
    if _right(base) is None:
        points = [signed(value, decimals) for value in (interval.mean, interval.low, interval.high)]
        return f"has {points[0]} {row.measure.points} in {row.measure.name} ({points[1]} to {points[2]})"
    kept = [_kept(value, base) for value in (interval.mean, interval.high, interval.low)]
    return f"keeps {kept[0]} of its right answers ({kept[1]} to {kept[2]})"


def _right(base: Row) -> float | None:
    """The share of what the baseline gets right, in %; None where quality is no such share, or it gets none."""
    if base.measure.unit != "%" or base.quality is None or not base.quality < 100:
        return None
    return 100 - base.quality


def _kept(points: float, base: Row) -> str:
    """The share of the baseline's right answers that is kept when so many percentage points more are wrong."""
    right = _right(base)
    assert right is not None
    return f"{plain(100 * min(max(1 - points / right, 0.0), 100 / right), 0)}%"


def _smallest(parts: Sequence[_Part], base: Row, decimals: int) -> str:
    """With each way and kind the smallest budget at which a method is not shown to be worse than the baseline."""
    texts = []
    for where in dict.fromkeys(part.where for part in parts):
        enough = [part for part in parts if part.where == where and part.enough is not None]
        if not enough:
            texts.append(f"none{where}")
            continue
        part = min(enough, key=lambda part: part.share)
        assert part.enough is not None
        assert part.enough.versus_baseline is not None
        high = part.enough.versus_baseline.high
        unit = _unit(part.enough)
        # An interval that is a point bounds nothing.
        bound = f", {plain(high, decimals)} {unit} worse at most" if part.enough.versus_baseline.low < high else ""
        texts.append(f"{part.budget}{where} ({part.enough.series}{bound})")
    return f"Smallest budget at which a method is not shown to be worse than {base.label}: {'; '.join(texts)}."


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


def _all_worse(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row.verdict == "worse" for row in rows)


def _unit(row: Row) -> str:
    return "points" if row.measure.points == "percentage points" else row.measure.points


def _worse(interval: Interval | None) -> bool:
    return interval is not None and interval.above_zero


def _price(row: Row, base: Row, decimals: int) -> str:
    """What a method costs in quality, and saves."""
    parts = []
    if row.versus_baseline is not None:
        shown = "" if row.verdict in ("better", "worse") else ", no difference shown"
        mean = signed(row.versus_baseline.mean, decimals)
        parts.append(f"{row.measure.name} {mean} {_unit(row)} to {base.label}{shown}")
    else:
        parts.append(f"{row.measure.name} {plain(row.quality or 0.0, decimals)}")
    if row.costs.cache_bytes is not None and row.costs.full_cache_bytes:
        parts.append(f"{ratio(row.costs.cache_bytes / row.costs.full_cache_bytes)} the bytes")
    if row.relative_flops is not None:
        parts.append(f"{ratio(row.relative_flops)} the FLOPs")
    if row.relative_seconds is not None:
        reading = " of reading" if row.relative_decode_seconds is not None else ""
        parts.append(f"{ratio(row.relative_seconds)} the time{reading}")
    if row.relative_decode_seconds is not None:
        parts.append(f"{ratio(row.relative_decode_seconds)} the time of a token")
    return ", ".join(parts)
