"""Numbers as people read them, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NOT_MEASURED = "not measured"


def amount(value: float | None) -> str:
    """A count to three significant digits with an SI prefix: ``4.20 T`` for 4.2e12."""
    if value is None:
        return NOT_MEASURED
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = min(int(math.log10(value) // 3), len(prefixes) - 1) if value >= 1 else 0
    scaled = f"{value / 1000**power:#.3g}".rstrip(".")
    if float(scaled) >= 1000 and power + 1 < len(prefixes):
        power, scaled = power + 1, "1.00"
    if power == 0 and float(value).is_integer():
        scaled = f"{value:.0f}"
    return f"{scaled} {prefixes[power]}".strip()


def duration(seconds: float | None) -> str:
    """``1.35 ms``, ``218 ms``, ``8.3 s``, ``48 s``, ``6 min 12 s``, ``2 h 05 min``."""
    if seconds is None:
        return NOT_MEASURED
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:#.3g}".rstrip(".") + " ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def memory(size: float | None) -> str:
    """``27 KiB``, ``3.5 MiB``, ``812 MiB``, ``1.42 GiB``."""
    if size is None:
        return NOT_MEASURED
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    if size < 2**30:
        return f"{size / 2**20:.{int(size < 9.95 * 2**20)}f} MiB"
    return f"{size / 2**30:.2f} GiB"


def budget(unit: str, amount: float) -> str:
    """What a method may keep, exactly: ``0.25`` of a share, ``64 tokens``, ``512 KiB``."""
    if unit == "tokens":
        return f"{amount:g} tokens"
    if unit != "bytes":
        return f"{amount:g}"
    units = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "bytes"}
    size = next(size for size in units if amount % size == 0)
    return f"{int(amount) // size} {units[size]}"


def ratio(value: float | None) -> str:
    """``1.31×``."""
    return NOT_MEASURED if value is None else f"{value:.2f}×"


def plain(value: float, decimals: int) -> str:
    """A number with a real minus sign; no sign where it rounds to zero."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def signed(value: float, decimals: int) -> str:
    """As `plain`, with a plus sign on positive numbers."""
    text = plain(value, decimals)
    return f"+{text}" if value > 0 and text[0].isdigit() and float(text) != 0 else text


def decimals_for(half_widths: Iterable[float]) -> int:
    """How many decimals show the typical interval to two digits; between 2 and 6, 3 where there is none."""
    widths = sorted(width for width in half_widths if math.isfinite(width) and width > 0)
    return min(max(1 - math.floor(math.log10(widths[len(widths) // 2])), 2), 6) if widths else 3


def listing(items: Sequence[str], last: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
