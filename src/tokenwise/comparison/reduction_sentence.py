"""The answer of a comparison at several budgets: which method to use at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenwise.comparison.formatting import listing, plain, ratio, signed
from tokenwise.comparison.sentence import SAME_COST
from tokenwise.comparison.statistics import Interval

if TYPE_CHECKING:
    from tokenwise.comparison.answer import Row


@dataclass(frozen=True)
class _Part:
    """What is said of one budget: the methods to use, their series, and the words."""

    share: float
    unit: str
    labels: tuple[str, ...]
    series: tuple[str, ...]
    text: str

    @property
    def budget(self) -> str:
        return _budgets([self])


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
        unit: ``keep`` or ``flops``.

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
    shares = sorted({row.share for row in rows if row.share is not None and row.label != baseline}, reverse=True)
    parts = []
    for share in shares:
        here = [row for row in rows if row.share == share]
        parts.append(_Part(share, unit, *_at(here, base, between, decimals)))
    if not parts:
        return f"Nothing to choose from: {baseline} is the only method.", (), ()
    points = tuple(f"{part.budget[:1].upper()}{part.budget[1:]}: {part.text}." for part in parts)
    named = tuple(label for part in parts for label in part.labels)
    budgets = _budgets(parts)
    if not named:
        return f"No method is shown to be better than chance at {budgets}.", points, ()
    if len({part.series for part in parts}) == 1:
        return f"Use {listing(parts[0].series, 'or')} at {budgets}.", points, named
    clear = [f"{listing(part.series, 'or')} at {part.budget}" for part in parts if part.labels]
    unclear = [part for part in parts if not part.labels]
    rest = f"; at {_budgets(unclear)} no method is shown to be better than chance" if unclear else ""
    return f"Use {listing(clear)}{rest}.", points, named


def _budgets(parts: Sequence[_Part]) -> str:
    """``keep 0.75, 0.5 and 0.25``."""
    shares = listing([f"{part.share:g}" for part in parts])
    return f"keep {shares}" if parts[0].unit == "keep" else f"{shares} of the FLOPs"


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
    if row.relative_flops is not None:
        parts.append(f"{ratio(row.relative_flops)} the FLOPs")
    if row.relative_seconds is not None:
        parts.append(f"{ratio(row.relative_seconds)} the time")
    return ", ".join(parts)
