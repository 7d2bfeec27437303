"""Small parts to draw charts as SVG: scales, ticks, markers, labels that keep out of each other's way.

Everything is a string of SVG. Colours come from CSS classes, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

FONT_SIZE = 12.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the scale."""
        if self.log:
            return log_ticks(self.low, self.high)
        return ticks(self.low, self.high, count)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten in [low, high], about `count` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(inside) >= 3:
            break
    return inside


def tick_decimals(values: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    if len(values) < 2:
        return 3
    step = min(b - a for a, b in pairwise(values))
    return next((digits for digits in range(7) if abs(round(step, digits) - step) < step * 1e-6), 7)


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of the values with room on both sides; never empty."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.01 or 1.0
    return low - room, high + room


def text_width(string: str, size: float = FONT_SIZE) -> float:
    """A safe estimate of a text's width in a system font, in pixels."""
    return (
        sum(0.4 if letter in "ilj.,:;|'!()[] ft" else 1.0 if letter in "mwMW@—" else 0.67 for letter in string) * size
    )


def shorten(string: str, width: float, size: float = FONT_SIZE) -> str:
    """The string, cut with an ellipsis where it is wider than `width` pixels."""
    if text_width(string, size) <= width:
        return string
    while string and text_width(string + "…", size) > width:
        string = string[:-1]
    return string + "…"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart to at least `gap`, as little as possible, in their order, and inside [low, high]."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    # Neighbours that touch form blocks; a block sits around the mean of what its members want.
    blocks: list[tuple[float, int]] = []  # (first position of the block, members)
    wants: list[list[float]] = []
    for index in order:
        wants.append([positions[index]])
        blocks.append((positions[index], 1))
        while len(blocks) > 1 and blocks[-2][0] + blocks[-2][1] * gap > blocks[-1][0]:
            wants[-2:] = [wants[-2] + wants[-1]]
            size = len(wants[-1])
            middle = sum(want - place * gap for place, want in enumerate(wants[-1])) / size
            blocks[-2:] = [(middle, size)]
    placed = [first + place * gap for first, size in blocks for place in range(size)]
    for place in range(len(placed)):
        placed[place] = max(placed[place], low + place * gap)
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], high - (len(placed) - 1 - place) * gap)
    result = [0.0] * len(positions)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result


def place_labels(anchors: Sequence[Point], labels: Sequence[str], taken: Sequence[Box], area: Box) -> list[Box | None]:
    """A free box for each label beside its anchor, or None where every place is taken.

    Args:
        anchors: the points to label, in pixels.
        labels: the texts.
        taken: boxes to keep out of: markers, bars.
        area: where labels may lie.
    """
    occupied = list(taken)
    placed: list[Box | None] = []
    height = FONT_SIZE * 1.25
    for (x, y), label in zip(anchors, labels, strict=True):
        width = text_width(label)
        places = [
            (left, y + shift)
            for shift in (0.0, -height, height)
            for left in (x + 10, x - 10 - width, x - width / 2)
            if shift or left != x - width / 2
        ]
        boxes = [Box(left, middle - height / 2, left + width, middle + height / 2) for left, middle in places]
        free = (box for box in boxes if box.within(area) and not any(box.overlaps(other) for other in occupied))
        box = next(free, None)
        placed.append(box)
        if box is not None:
            occupied.append(box)
    return placed


def number(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def svg(width: float, height: float, label: str, parts: Sequence[str], classes: str) -> str:
    """The whole drawing, scaling with its column, with `label` for those who cannot see it."""
    return (
        f'<svg class="{classes}" viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" '
        f'height="{number(height)}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, string: str, classes: str = "", anchor: str = "start") -> str:
    """A text whose middle line is at y; anchor is start, middle or end."""
    return (
        f'<text x="{number(x)}" y="{number(y + FONT_SIZE * 0.35)}" text-anchor="{anchor}" class="{classes}">'
        f"{escape(string)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<path d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}" class="{classes}"/>'


def path(points: Sequence[Point], classes: str) -> str:
    """A line through the points, interrupted where one is not finite."""
    steps, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            steps.append(f"{pen}{number(x)} {number(y)}")
            pen = "L"
        else:
            pen = "M"
    return f'<path d="{"".join(steps)}" class="{classes}"/>'


def band(upper: Sequence[Point], lower: Sequence[Point], classes: str) -> str:
    """The area between two lines over the same x; points that are not finite are left out."""
    outline = [point for point in (*upper, *reversed(lower)) if math.isfinite(point[1])]
    return f'<path d="M{"L".join(f"{number(x)} {number(y)}" for x, y in outline)}Z" class="{classes}"/>'


_SHAPES = {
    "circle": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1 -5 0Z",
    "square": "M-4.4 -4.4H4.4V4.4H-4.4Z",
    "diamond": "M0 -6L6 0L0 6L-6 0Z",
    "up": "M0 -5.8L5.6 4.2H-5.6Z",
    "down": "M0 5.8L5.6 -4.2H-5.6Z",
    "cross": "M-5 -2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z",
}


def marker(shape: str, x: float, y: float, classes: str, title: str = "") -> str:
    """A marker around (x, y): circle, square, diamond, up, down or cross, with `title` on hover."""
    hover = f"<title>{escape(title)}</title>" if title else ""
    return f'<path d="{_SHAPES[shape]}" transform="translate({number(x)} {number(y)})" class="{classes}">{hover}</path>'


def cell(x: float, y: float, width: float, height: float, share: float, string: str, title: str) -> str:
    """A cell of a heat map, the stronger the larger `share` is (from 0 to 1; NaN is empty), with `title` on hover."""
    strength = 0.0 if math.isnan(share) else share
    classes = "cell strong" if strength > 0.55 else "cell"
    return (
        f'<g class="{classes}"><title>{escape(title)}</title><rect x="{number(x)}" y="{number(y)}" '
        f'width="{number(width)}" height="{number(height)}" rx="2" fill-opacity="{strength:.2f}"/>'
        f"{text(x + width / 2, y + height / 2, string, 'tick', 'middle')}</g>"
    )


@dataclass(frozen=True)
class Style:
    """How a method looks in every chart: a CSS class for its colour, and a marker, so that colour is never alone."""

    colour: str
    shape: str


def styles(roles: Sequence[tuple[str, str]]) -> dict[str, Style]:
    """A style for each (label, role): greys for baseline and controls, colours for candidates."""
    shapes = ("circle", "diamond", "up", "down")
    found: dict[str, Style] = {}
    for label, role in roles:
        if role == "baseline":
            found[label] = Style("baseline", "square")
        elif role == "control":
            found[label] = Style("control", "cross")
        else:
            place = sum(style.colour.startswith("colour") for style in found.values())
            # Twelve candidates differ in the pair; more look alike, and their names tell them apart.
            found[label] = Style(f"colour{place % 6 + 1}", shapes[place % 4])
    return found
