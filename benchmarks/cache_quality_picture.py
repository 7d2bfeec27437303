"""The picture that benchmarks/cache_quality.py draws: right answers against bytes, a small chart for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from tokenwise.comparison import charts
from tokenwise.comparison.charts import Scale

COLUMNS, WIDTH, HEIGHT, LEFT, TOP = 4, 190.0, 132.0, 34.0, 40.0
TICKS = (0.05, 0.1, 0.2, 0.5)
STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; fill: #1b1f24; }
.tick { font-size: 10px; fill: #59626d; }
.grid { stroke: #d9dde2; }
.page { fill: #ffffff; }
.line { fill: none; stroke-width: 2; } .line.visible { stroke-width: 4; }
.chance { fill: none; stroke-width: 1.2; stroke-dasharray: 3 3; }
.each { fill: none; stroke-width: 1; stroke-opacity: 0.4; }
.random { stroke: #59626d; }
.visible { stroke: #c14a00; }
.hidden { stroke: #0b6bb5; }
"""


@dataclass(frozen=True)
class Line:
    """What a method gets right by what it keeps.

    Args:
        shares: of the full cache's bytes.
        each: the share of right answers of each repetition at each share, [repetitions, shares].
        chance_shares: the same of a random choice.
        chance: the share of right answers of a random choice, the mean, at each of its shares.
    """

    shares: Sequence[float]
    each: Sequence[Sequence[float]]
    chance_shares: Sequence[float]
    chance: Sequence[float]

    @property
    def mean(self) -> list[float]:
        """Of the repetitions, at each share."""
        return [fmean(values) for values in zip(*self.each, strict=True)]


@dataclass(frozen=True)
class Panel:
    """A method.

    Args:
        name: the method's.
        reads: whether its shares are what is read, and not what is stored.
        lines: by setting, visible and hidden.
    """

    name: str
    reads: bool
    lines: Mapping[str, Line]


def picture(panels: Sequence[Panel]) -> str:
    """The drawing, as SVG."""
    rows = -(-len(panels) // COLUMNS)
    width, height = LEFT + COLUMNS * WIDTH, TOP + rows * HEIGHT + 22
    parts = [f"<style>{STYLE}</style>", f'<rect class="page" width="{width}" height="{height}"/>', *legend()]
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        parts += chart(panel, LEFT + column * WIDTH, TOP + row * HEIGHT, column == 0, index + COLUMNS >= len(panels))
    parts.append(
        charts.text(
            LEFT,
            height - 10,
            "Share of the full cache's bytes; *: all is stored, and this share read at each step",
            "tick",
        )
    )
    described = "; ".join(f"{panel.name} {said(panel)}" for panel in panels)
    drawn = charts.svg(width, height, f"Right answers in % by share of bytes. {described}.", parts, "study")
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def said(panel: Panel) -> str:
    """A method's right answers at its smallest and its largest budget."""
    ends = (f"{100 * line.mean[0]:.0f} to {100 * line.mean[-1]:.0f} {way}" for way, line in panel.lines.items())
    return ", ".join(ends)


def legend() -> list[str]:
    """What the lines are."""
    parts = [charts.text(LEFT, 14, "Right answers, %")]
    keys = (
        ("line visible", "question visible"),
        ("line hidden", "question hidden"),
        ("chance random", "random"),
    )
    for index, (classes, name) in enumerate(keys):
        x = LEFT + 130 + index * 150
        parts += [charts.line(x, 14, x + 24, 14, classes), charts.text(x + 30, 14, name)]
    return [*parts, charts.text(LEFT + 540, 14, "thin: a training seed each")]


def chart(panel: Panel, left: float, top: float, first: bool, last: bool) -> list[str]:
    """A method's chart; the first of a row has numbers on its left, the last of a column below."""
    x = Scale(0.035, 0.56, left, left + WIDTH - 14, log=True)
    y = Scale(0.0, 1.0, top + HEIGHT - 26, top + 18)
    parts = [charts.text(left, top + 7, charts.shorten(f"{panel.name}{'*' * panel.reads}", 1.1 * WIDTH))]

    def drawn(shares: Sequence[float], values: Sequence[float], classes: str) -> str:
        return charts.path([(x(share), y(value)) for share, value in zip(shares, values, strict=True)], classes)

    for share in (0.0, 0.5, 1.0):
        parts.append(charts.line(x.start, y(share), x.end, y(share), "grid"))
        if first:
            parts.append(charts.text(left - 6, y(share), f"{100 * share:.0f}", "tick", "end"))
    if last:
        parts += [charts.text(x(share), y(0.0) + 11, f"{share:g}", "tick", "middle") for share in TICKS]
    for way, line in panel.lines.items():
        parts += [drawn(line.shares, values, f"each {way}") for values in line.each]
        parts.append(drawn(line.chance_shares, line.chance, f"chance {way}"))
    parts += [drawn(line.shares, line.mean, f"line {way}") for way, line in panel.lines.items()]
    return parts
