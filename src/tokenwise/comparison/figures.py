"""The report's figures: quality against cost, curves, differences, two goals. Each in a wide and a narrow drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tokenwise.comparison import charts
from tokenwise.comparison.answer import Conclusion, Row
from tokenwise.comparison.charts import Box, Scale, Style
from tokenwise.comparison.formatting import amount, budget, duration, memory, plain, ratio, signed
from tokenwise.comparison.quality import RecallQuality
from tokenwise.comparison.records import Point, Result
from tokenwise.comparison.statistics import Interval
from tokenwise.comparison.wording import wording

MEASURES = {
    "flops": "FLOPs",
    "cache_bytes": "Key-value cache",
    "wall_seconds": "Wall time",
    "decode_seconds": "Time of a token",
    "tokens_trained": "Tokens trained on",
}
_TIMES = ("wall_seconds", "decode_seconds")
DEPTHS = 10
"""Parts of a context into which answers are put by their depth."""
_LOG_FROM = 20.0
"""A cost axis is logarithmic from this ratio of largest to smallest."""
_FAR_WORSE = 4.0
"""The axis of differences ends at this many times the typical end of an interval."""
_OFF_SCALE = 8.0
"""A method this many times further from the baseline than is typical is marked at the edge, not drawn to scale."""


def title_of(conclusion: Conclusion, measure: str) -> str:
    """What a cost, a key of `MEASURES`, is called."""
    if measure == "wall_seconds" and conclusion.family == "cache":
        return "Time of reading"
    return MEASURES[measure]


def pareto_front(points: Sequence[charts.Point]) -> list[charts.Point]:
    """The points with no other that is both cheaper (x) and lower in loss (y), by cost."""
    front: list[charts.Point] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def off_scale(conclusion: Conclusion) -> set[str]:
    """Methods so much worse than the baseline that drawing them to scale would flatten all others."""
    if not conclusion.trains:
        return set()  # how far quality falls with the budget is what the drawing is to show
    compared = [row for row in conclusion.rows if row.versus_baseline and math.isfinite(row.versus_baseline.mean)]
    differences = {row.label: row.versus_baseline.mean for row in compared if row.versus_baseline}
    if len(differences) < 3:
        return set()
    typical = float(np.median(np.abs(list(differences.values()))))
    spread = max((row.spread or 0.0 for row in compared), default=0.0)
    return {label for label, value in differences.items() if value > _OFF_SCALE * max(typical, spread)}


def cost_figure(
    conclusion: Conclusion, styles: Mapping[str, Style], measure: str, wide: bool, way: str = ""
) -> str | None:
    """Held-out quality against a cost; None where fewer than two methods have both.

    Args:
        conclusion: what to draw.
        styles: by label.
        measure: a key of `MEASURES`.
        wide: 540 pixels, else 340.
        way: of running methods, to draw those of one way and the baseline alone.
    """
    rows = [
        row
        for row in conclusion.rows
        if _drawable(row, measure) and (not way or row.way == way or row.role == "baseline")
    ]
    if len(rows) < 2:
        return None
    width, height = (540.0, 370.0) if wide else (340.0, 320.0)
    own = {row.label: float(getattr(row.costs, measure)) for row in rows}
    total = {row.label: own[row.label] + _charged(row, measure) for row in rows}
    loss = {row.label: row.quality or 0.0 for row in rows}
    divisor, unit = _unit(measure, max(total.values()))
    log = max(total.values()) > _LOG_FROM * min(own.values()) > 0
    cheapest, dearest = min(own.values()) / divisor, max(total.values()) / divisor
    # Costs that are nearly equal must look so: the axis spans a third of the largest cost at least.
    room = max(0.16 * (dearest - cheapest), 0.17 * dearest - (dearest - cheapest) / 2) or 0.5
    x_range = (cheapest / 1.3, dearest * 1.3) if log else (max(cheapest - room, 0.0), dearest + room)
    beyond = off_scale(conclusion)
    bounds = [value for row in rows if row.label not in beyond for value in (row.lowest, row.highest)]
    frame = _Frame(width, height, x_range, charts.padded([value for value in bounds if value is not None], 0.12), log)
    per = wording(conclusion.family, conclusion.item).per.format(item=conclusion.item)
    title = title_of(conclusion, measure) + (per if measure != "decode_seconds" else "")
    parts = frame.axes(f"{title}{unit}" + ", reference included" * (not per), str(conclusion.measure))

    front = pareto_front([(total[row.label], loss[row.label]) for row in rows if row.label not in beyond])
    steps: list[charts.Point] = []
    for x, y in front:
        if steps:
            steps.append((frame.x(x / divisor), steps[-1][1]))
        steps.append((frame.x(x / divisor), frame.y(y)))
    steps.append((frame.area.right, steps[-1][1]))
    parts.append(charts.path(steps, "front"))

    for series in dict.fromkeys(row.series for row in rows if row.share is not None):
        line = sorted((total[row.label], loss[row.label]) for row in rows if row.series == series)
        style = next(styles[row.label] for row in rows if row.series == series)
        points = [(frame.x(x / divisor), frame.y(y)) for x, y in line]
        parts.append(charts.path(points, f"curve {style.colour}"))

    anchors, taken, names = [], [], []
    for row in rows:
        style = styles[row.label]
        off = row.label in beyond
        x, y = frame.x(total[row.label] / divisor), frame.area.top + 8 if off else frame.y(loss[row.label])
        name = charts.shorten(_name(row, rows), width * 0.36)
        names.append(f"{name} {plain(loss[row.label], 2)}{', off the scale' if wide else ' ↑'}" if off else name)
        value = f"{plain(loss[row.label], conclusion.decimals)} {conclusion.measure.unit}"
        hover = f"{row.label}: {value}, {_cost_text(row, measure)}"
        if total[row.label] > own[row.label]:
            start = frame.x(own[row.label] / divisor)
            parts.append(charts.line(start, y, x, y, f"charged {style.colour}"))
            parts.append(charts.marker(style.shape, start, y, f"hollow {style.colour}", f"{row.label} alone"))
            taken.append(Box(start - 7, y - 5, x, y + 5))
        if not off and row.lowest is not None and row.highest is not None and row.highest > row.lowest:
            top, bottom = frame.y(row.highest), frame.y(row.lowest)
            parts.append(charts.line(x, top, x, bottom, f"bar {style.colour}"))
            parts += [charts.line(x - 4, end, x + 4, end, f"bar {style.colour}") for end in (top, bottom)]
            taken.append(Box(x - 4, top, x + 4, bottom))
        parts.append(charts.marker(style.shape, x, y, f"marker {style.colour}", hover))
        taken.append(Box(x - 7, y - 7, x + 7, y + 7))
        anchors.append((x, y))
    for name, box in zip(names, charts.place_labels(anchors, names, taken, frame.area), strict=True):
        if box is not None:
            parts.append(charts.text(box.left, (box.top + box.bottom) / 2, name, "halo name"))
    described = "; ".join(
        f"{row.label} {plain(loss[row.label], conclusion.decimals)} at {_cost_text(row, measure)}" for row in rows
    )
    return charts.svg(
        width,
        height,
        f"{conclusion.measure.title} against {title_of(conclusion, measure)}. {described}.",
        parts,
        _size(wide),
    )


def curve_figure(
    conclusion: Conclusion, results: Sequence[Result], styles: Mapping[str, Style], start: float, wide: bool
) -> str | None:
    """Held-out quality against the share of the budget spent, from `start` on; None without at least two points."""
    curves = {row.label: _curve(row.label, results, start) for row in conclusion.rows}
    beyond = off_scale(conclusion) if start > 0 else set()  # a whole run spans the early losses anyway
    drawn = {label: curve for label, curve in curves.items() if curve is not None and label not in beyond}
    finite = [value for curve in drawn.values() for value in curve[1:].ravel() if math.isfinite(value)]
    if not drawn or not finite:
        return None
    width, height = (540.0, 370.0) if wide else (340.0, 320.0)
    names = {label: charts.shorten(label, 120) for label in drawn}
    right = 14 + max(charts.text_width(name) for name in names.values()) if wide else 16
    frame = _Frame(width, height, (start * 100, 100), charts.padded(finite, 0.05), right=right)
    parts = frame.axes("share of the budget spent, %", str(conclusion.curve_measure))
    ends = {}
    # The band lies below all lines, and the baseline below the candidates.
    for label, (shares, _, lowest, highest) in drawn.items():
        if not np.array_equal(lowest, highest, equal_nan=True):
            xs = [frame.x(share * 100) for share in shares]
            upper = [(x, frame.y(value)) for x, value in zip(xs, highest, strict=True)]
            lower = [(x, frame.y(value)) for x, value in zip(xs, lowest, strict=True)]
            parts.append(charts.band(upper, lower, f"band {styles[label].colour}"))
    for label, (shares, mean, _, _) in drawn.items():
        points = [(frame.x(share * 100), frame.y(value)) for share, value in zip(shares, mean, strict=True)]
        parts.append(charts.path(points, f"curve {styles[label].colour}"))
        last = next((point for point in reversed(points) if math.isfinite(point[1])), None)
        if last is not None:
            hover = f"{label}: {plain(float(mean[-1]), conclusion.decimals)} {conclusion.curve_measure.unit} at the end"
            parts.append(charts.marker(styles[label].shape, *last, f"marker {styles[label].colour}", hover))
            ends[label] = last
    if wide:
        heights = charts.spread([y for _, y in ends.values()], 16, frame.area.top + 6, frame.area.bottom - 6)
        for (label, _), y in zip(ends.items(), heights, strict=True):
            parts.append(charts.text(frame.area.right + 10, y, names[label], "name"))
    if beyond & curves.keys():
        left_out = charts.shorten(
            f"off the scale: {', '.join(sorted(beyond & curves.keys()))}", frame.x.end - frame.x.start
        )
        parts.append(charts.text(frame.area.right, frame.area.top - 4, left_out, "axis halo", "end"))
    described = (
        f"Curves of {conclusion.curve_measure.name} for {', '.join(drawn)}, from {start:.0%} of the budget to its end."
    )
    return charts.svg(width, height, described, parts, _size(wide))


def depth_figure(conclusion: Conclusion, results: Sequence[Result], way: str, wide: bool) -> str | None:
    """How often each method answers right, by where in the context the answer stands; None where that is not known.

    Args:
        conclusion: gives the order of the methods.
        results: of every job; means over the finished seeds are drawn.
        way: of running methods, to draw those of one way and the baseline alone; all where it is empty.
        wide: 900 pixels, else 340.
    """
    found: dict[str, list[RecallQuality]] = {}
    for result in results:
        if result.status == "finished" and isinstance(result.quality, RecallQuality) and result.quality.depth:
            found.setdefault(result.job.label, []).append(result.quality)
    rows = [row for row in conclusion.rows if row.label in found]
    rows = [row for row in rows if not way or row.way == way or row.role == "baseline"]
    if not rows:
        return None
    count = DEPTHS if wide else DEPTHS // 2
    place = np.minimum((np.array(found[rows[0].label][0].depth) * count).astype(int), count - 1)
    # At each budget the methods stand together.
    rows = sorted(rows, key=lambda row: (row.role != "baseline", -(row.share or 0.0)))
    names = [charts.shorten(row.label.removesuffix(f" {way}"), 190 if wide else 120) for row in rows]
    left = 12 + max(charts.text_width(name) for name in names)
    width, height, top, gap = 900.0 if wide else 340.0, 22.0, 40.0, 8.0
    step = (width - left - 4) / count
    parts = [charts.text(left, 8, "where the answer stands in the context, % →", "axis")]
    for column in range(count):
        middle = left + (column + 0.5) * step
        parts.append(
            charts.text(middle, 26, f"{100 * column // count}–{100 * (column + 1) // count}", "tick", "middle")
        )
    y, before = top, rows[0].share
    for row, name in zip(rows, names, strict=True):
        if row.share != before:
            y, before = y + gap, row.share
        right = np.mean([quality.correct for quality in found[row.label]], axis=0)
        parts.append(charts.text(left - 8, y + height / 2, name, "tick", "end"))
        for column in range(count):
            here = right[place == column]
            share = float(here.mean()) if len(here) else math.nan
            shown = "–" if math.isnan(share) else plain(100 * share, 0)
            title = f"{row.label}, {100 * column // count} to {100 * (column + 1) // count}% of the context: "
            title += "no question" if math.isnan(share) else f"{shown}% of {len(here)} answered right"
            parts.append(charts.cell(left + column * step, y, step - 2, height - 2, share, shown, title))
        y += height
    described = f"Right answers by depth for {', '.join(row.label for row in rows)}."
    return charts.svg(width, y + 4, described, parts, _size(wide))


def goals_figure(
    conclusion: Conclusion, results: Sequence[Result], styles: Mapping[str, Style], wide: bool
) -> str | None:
    """Two goals that pull against each other, a point for each method; None where there are not two goals.

    A point is the mean over the finished seeds, its bars reach from the lowest to the highest.
    """
    found: dict[str, list[charts.Point]] = {}
    measures = None
    for result in results:
        quality = result.quality if result.job.kind == "run" and result.status == "finished" else None
        if quality is not None and quality.goals is not None and quality.finite:
            (first, x), (second, y) = quality.goals
            measures = first, second
            found.setdefault(result.job.label, []).append((x, y))
    if measures is None:
        return None
    labels = [row.label for row in conclusion.rows if row.label in found]
    values = [np.array(found[label]) for label in labels]
    everything = np.concatenate(values)
    width, height = (640.0, 430.0) if wide else (340.0, 340.0)
    # The corner where both goals are reached is always in the picture, so that distance to it can be seen.
    ranges = []
    for column in everything.T:
        low = max(float(column.min()) - 0.12 * max(100 - float(column.min()), 5.0), 0.0)
        ranges.append((low, 100 + 0.04 * (100 - low)))
    frame = _Frame(width, height, ranges[0], ranges[1])
    area = frame.area
    parts = frame.axes(*map(str, measures))
    corner = frame.x(100), frame.y(100)
    reach = min(corner[0] - area.left, area.bottom - corner[1])
    parts += [
        f'<path d="M{charts.number(corner[0] - share * reach)} {charts.number(corner[1])}'
        f"A{charts.number(share * reach)} {charts.number(share * reach)} 0 0 0 "
        f"{charts.number(corner[0])} {charts.number(corner[1] + share * reach)}L{charts.number(corner[0])} "
        f'{charts.number(corner[1])}Z" class="best"/>'
        for share in (0.3, 0.15)
    ]
    ideal = "better: all forgotten, all kept" if wide else "better"
    taken = [Box(corner[0] - charts.text_width(ideal) - 12, corner[1] - 16, area.right, corner[1])]
    parts.append(charts.text(corner[0] - 6, corner[1] - 9, f"{ideal} ↗", "axis halo", "end"))

    means = {label: tuple(own.mean(axis=0)) for label, own in zip(labels, values, strict=True)}
    front = pareto_front([(-x, -y) for x, y in means.values()])
    parts.append(charts.path([(frame.x(-x), frame.y(-y)) for x, y in front], "front"))
    anchors = []
    described = []
    digits = measures[0].decimals or 1
    for label, own in zip(labels, values, strict=True):
        style = styles[label]
        x, y = (scale(value) for scale, value in zip((frame.x, frame.y), means[label], strict=True))
        (left, bottom), (right, top) = own.min(axis=0), own.max(axis=0)
        if right > left:
            parts += _bar([(frame.x(left), y), (frame.x(right), y)], style)
            taken.append(Box(frame.x(left), y - 4, frame.x(right), y + 4))
        if top > bottom:
            parts += _bar([(x, frame.y(bottom)), (x, frame.y(top))], style)
            taken.append(Box(x - 4, frame.y(top), x + 4, frame.y(bottom)))
        both = [f"{plain(value, digits)}% {m.name}" for value, m in zip(means[label], measures, strict=True)]
        described.append(f"{label}: {', '.join(both)}")
        parts.append(charts.marker(style.shape, x, y, f"marker {style.colour}", described[-1]))
        taken.append(Box(x - 7, y - 7, x + 7, y + 7))
        anchors.append((x, y))
    names = [charts.shorten(label, width * 0.36) for label in labels]
    for name, box in zip(names, charts.place_labels(anchors, names, taken, area), strict=True):
        if box is not None:
            parts.append(charts.text(box.left, (box.top + box.bottom) / 2, name, "halo name"))
    title = f"{measures[1].title} against {measures[0].name}, better towards the upper right. {'; '.join(described)}."
    return charts.svg(width, height, title, parts, _size(wide))


def _bar(ends: Sequence[charts.Point], style: Style) -> list[str]:
    """A line between two points on one height or one above the other, with a short stroke across each end."""
    (x1, y1), (x2, y2) = ends
    across = (0.0, 4.0) if y1 == y2 else (4.0, 0.0)
    strokes = [(x - across[0], y - across[1], x + across[0], y + across[1]) for x, y in ends]
    return [charts.line(*stroke, f"bar {style.colour}") for stroke in ((x1, y1, x2, y2), *strokes)]


def difference_figure(conclusion: Conclusion, styles: Mapping[str, Style], wide: bool) -> str | None:
    """Each method's difference to the baseline, and to its random control, with intervals; None without any."""
    lines = [
        (row, interval, other)
        for row in conclusion.rows
        for interval, other in ((row.versus_baseline, conclusion.baseline), (row.versus_control, row.control))
        if interval is not None and other is not None
    ]
    ends = [end for _, interval, _ in lines for end in (interval.low, interval.high) if math.isfinite(end)]
    if not ends:
        return None
    # What is far worse may leave the drawing, so that it does not flatten the rest; what is better never does.
    worst = min(max(ends), _FAR_WORSE * float(np.median(np.abs(ends))))
    span = max(worst, 0.0) - min([*ends, 0.0]) or 1.0
    low, high = min(min(ends), -0.15 * span) - 0.04 * span, max(worst, 0.15 * span) + 0.04 * span
    width = 900.0 if wide else 340.0
    pitch, top = (34.0, 14.0) if wide else (54.0, 10.0)
    height = top + pitch * len(lines) + 52
    left, right = (215.0, width - 310) if wide else (6.0, width - 6)
    x = Scale(low, high, left, right)
    bottom = top + pitch * len(lines)
    parts = []
    values = x.ticks(6 if wide else 4)
    digits = charts.tick_decimals(values)
    for value in values:
        parts.append(charts.line(x(value), top, x(value), bottom, "zero" if value == 0 else "grid"))
        parts.append(charts.text(x(value), bottom + 13, signed(value, digits), "tick", "middle"))
    parts.append(charts.text(left, bottom + 33, "← better", "axis"))
    parts.append(
        charts.text((left + right) / 2, bottom + 33, f"difference, {conclusion.measure.points}", "axis", "middle")
    )
    parts.append(charts.text(right, bottom + 33, "worse →", "axis", "end"))
    described = []
    for place, (row, interval, other) in enumerate(lines):
        main = other == conclusion.baseline and interval is row.versus_baseline
        style = styles[row.label]
        y = top + pitch * (place + (0.5 if wide else 0.72))
        result = _interval_text(interval, conclusion.decimals)
        verdict = _verdict(interval)
        described.append(f"{row.label} against {other}: {result}, {verdict}")
        name = row.label if main else f"against {other}"
        classes = "name" if main else "name minor"
        if wide:
            parts.append(charts.text(0 if main else 18, y, charts.shorten(name, 205 if main else 187), classes))
            parts.append(charts.text(right + 20, y, result, "value" if main else "value minor"))
            parts.append(charts.text(width, y, verdict, "value" if main else "value minor", "end"))
        else:
            above = y - 20
            shown = charts.shorten(name, width - 14 - charts.text_width(result))
            parts.append(charts.text(0, above, shown, f"halo {classes}"))
            parts.append(charts.text(width, above, result, "halo value" if main else "halo value minor", "end"))
        parts += _forest_line(x, y, interval, style, main, f"{row.label} against {other}: {result}")
    label = f"Differences in {conclusion.measure.name} with intervals, below zero is better. {'; '.join(described)}."
    return charts.svg(width, height, label, parts, _size(wide))


def _forest_line(x: Scale, y: float, interval: Interval, style: Style, main: bool, hover: str) -> list[str]:
    if not interval.finite:
        return []
    strength = "" if main else " minor"
    low, high = max(interval.low, x.low), min(interval.high, x.high)
    parts = []
    if low < high or interval.low == interval.high:
        parts.append(charts.line(x(low), y, x(high), y, f"bar {style.colour}{strength}"))
    inside = [value for value in (interval.low, interval.high) if main and x.low <= value <= x.high]
    parts += [charts.line(x(value), y - 4, x(value), y + 4, f"bar {style.colour}") for value in inside]
    for beyond, tip, inwards in ((interval.low < x.low, x.start, 6), (interval.high > x.high, x.end, -6)):
        if beyond:  # it goes on outside the drawing
            arrow = [(tip + inwards, y - 4), (tip, y), (tip + inwards, y + 4)]
            parts.append(charts.path(arrow, f"bar {style.colour}{strength}"))
    if x.low <= interval.mean <= x.high:
        kind = "marker" if main else "hollow"
        parts.append(charts.marker(style.shape, x(interval.mean), y, f"{kind} {style.colour}{strength}", hover))
    return parts


class _Frame:
    """The plot area of a chart with two axes."""

    def __init__(
        self,
        width: float,
        height: float,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        log: bool = False,
        right: float = 16,
    ):
        self.y_ticks = charts.ticks(*y_range, 7)
        self.digits = charts.tick_decimals(self.y_ticks)
        widest = max((charts.text_width(plain(value, self.digits)) for value in self.y_ticks), default=0)
        self.area = Box(widest + 14, 30, width - right, height - 46)
        self.x = Scale(*x_range, self.area.left, self.area.right, log)
        self.y = Scale(*y_range, self.area.bottom, self.area.top)

    def axes(self, x_title: str, y_title: str) -> list[str]:
        """Grid, tick labels and titles. The title of y stands above it, upright."""
        area = self.area
        parts = [charts.text(0, 10, f"↑ {y_title}", "axis")]
        for value in self.y_ticks:
            parts.append(charts.line(area.left, self.y(value), area.right, self.y(value), "grid"))
            parts.append(charts.text(area.left - 8, self.y(value), plain(value, self.digits), "tick", "end"))
        values = self.x.ticks(int((area.right - area.left) / 70))
        texts = [f"{value:g}" for value in values]
        for value, string in zip(values, texts, strict=True):
            x, half = self.x(value), charts.text_width(string) / 2
            parts.append(charts.line(x, area.bottom, x, area.bottom + 4, "base"))
            parts.append(charts.text(min(x, area.right + 14 - half), area.bottom + 14, string, "tick", "middle"))
        parts.append(charts.line(area.left, area.bottom, area.right, area.bottom, "base"))
        parts.append(charts.text(area.right, area.bottom + 35, f"{x_title} →", "axis", "end"))
        return parts


def _name(row: Row, rows: Sequence[Row]) -> str:
    """What stands beside a point: of a method at several budgets the name once, then the budget alone."""
    same = [other for other in rows if other.series == row.series]
    if len(same) == 1 or row.share is None:
        return row.label
    return row.label if row is max(same, key=lambda other: other.share or 0.0) else budget(row.unit, row.share)


def _size(wide: bool) -> str:
    return "chart wide" if wide else "chart narrow"


def _drawable(row: Row, measure: str) -> bool:
    costs = [row.costs] if row.reference_costs is None else [row.costs, row.reference_costs]
    known = all(getattr(cost, measure) is not None for cost in costs)
    comparable = measure not in _TIMES or all(cost.seconds_comparable for cost in costs)
    return known and comparable and row.quality is not None and math.isfinite(row.quality)


def _charged(row: Row, measure: str) -> float:
    return float(getattr(row.reference_costs, measure)) if row.reference_costs is not None else 0.0


def _unit(measure: str, largest: float) -> tuple[float, str]:
    """What to divide by so that ticks are short, and how the axis calls it."""
    if measure in _TIMES and largest < 0.1:
        return 0.001, " (ms)"
    if measure in _TIMES:
        return next((u for u in ((1.0, " (s)"), (60.0, " (min)")) if largest < 120 * u[0]), (3600.0, " (h)"))
    if measure == "cache_bytes":
        size, name = next(((s, n) for s, n in ((2**30, "GiB"), (2**20, "MiB")) if largest >= 2 * s), (2**10, "KiB"))
        return float(size), f" ({name})"
    power = max(int(math.log10(largest)) // 3 * 3, 0) if largest >= 1 else 0
    if measure == "tokens_trained" and power in (3, 6, 9):
        return 10.0**power, {3: " (thousands)", 6: " (millions)", 9: " (billions)"}[power]
    exponent = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return 10.0**power, f" (×10{exponent})" if power else ""


def _cost_text(row: Row, measure: str) -> str:
    show = {**dict.fromkeys(_TIMES, duration), "cache_bytes": memory}.get(measure, amount)
    unit = {"flops": " FLOPs", "tokens_trained": " tokens"}.get(measure, "")
    text = f"{show(getattr(row.costs, measure))}{unit}"
    if row.reference_costs is not None:
        text += f" and {show(getattr(row.reference_costs, measure))}{unit} for its reference"
    if measure == "flops" and row.relative_flops is not None:
        text += f" ({ratio(row.relative_flops)} the baseline)"
    return text


def _curve(label: str, results: Sequence[Result], start: float) -> np.ndarray | None:
    """Rows: shares, then mean, lowest and highest over the finished seeds, from share `start` on."""
    curves: list[list[Point]] = [
        result.curve
        for result in results
        if result.job.kind == "run" and result.job.label == label and result.status == "finished" and result.curve
    ]
    shares = sorted({round(point.share, 3) for curve in curves for point in curve if point.share >= start - 1e-3})
    if len(shares) < 2:
        return None
    losses = np.array([np.interp(shares, [p.share for p in curve], [p.held_out for p in curve]) for curve in curves])
    return np.stack([np.array(shares), losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)])


def _interval_text(interval: Interval, decimals: int) -> str:
    if not interval.finite:
        return "not finite"
    mean, low, high = (signed(value, decimals) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _verdict(interval: Interval) -> str:
    if not interval.finite:
        return "not comparable"
    return "better" if interval.below_zero else "worse" if interval.above_zero else "no difference shown"
