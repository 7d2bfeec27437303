"""A conclusion in the terminal: a compact table, then the sentence."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenwise.comparison.answer import Conclusion, Row
from tokenwise.comparison.formatting import amount, duration, memory, plain, ratio, signed
from tokenwise.comparison.statistics import Interval

_STYLES = {"better": "bold green", "worse": "bold red", "failed": "red", "not finite": "red"}


def print_conclusion(conclusion: Conclusion, console: Console) -> None:
    """Print the table of methods, the failed runs, the notes and the answer.

    The table fits 100 columns; a narrower console (80 columns) gets it without spread, memory and runs.
    """
    if conclusion.rows:
        console.print(_table(conclusion, wide=console.width >= 100))
    for failure in conclusion.failures:
        console.print(Text(f"{failure.label}, seed {failure.seed}, failed: {failure.reason}", style="red"))
    for note in conclusion.notes:
        console.print(Text(note, style="dim"))
    console.print()
    console.print(Text(conclusion.sentence, style="bold"))
    for remark in conclusion.remarks:
        console.print(Text(remark))
    for point in conclusion.points:
        console.print(Text(f"- {point}"))


def _table(conclusion: Conclusion, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    longest = max(len(row.label) for row in conclusion.rows)
    table.add_column("method", overflow="fold", min_width=min(longest, 16), max_width=20)
    table.add_column(_heading(conclusion), no_wrap=True)
    table.add_column(Text(f"against {conclusion.baseline}", overflow="ellipsis"), no_wrap=True)
    reduction = not conclusion.trains
    per = f"\nper {conclusion.item}" if reduction else ""
    counted = conclusion.trains or any(row.costs.flops is not None for row in conclusion.rows)
    if counted:
        table.add_column(f"FLOPs{per}", justify="right", no_wrap=True)
    cached = any(row.costs.cache_bytes is not None for row in conclusion.rows)
    written = any(row.costs.decode_seconds is not None for row in conclusion.rows)
    scoring = "\n(scoring)" if wide else ""
    table.add_column(f"reading{scoring}" if written else f"time{per}", justify="right", no_wrap=True)
    if wide:
        second = "tokens\ncache" if cached else "tokens\nat end" if reduction else "memory"
        table.add_column(second, justify="right", no_wrap=True)
        last_heading = f"a token{scoring}" if written else "scoring" if reduction else "runs"
        table.add_column(last_heading, justify="right", no_wrap=True)
    for row in conclusion.rows:
        last: tuple[str, ...] = (_memory(row), f"{len(row.finished)}/{row.planned}")
        time = _seconds(row)
        if written:
            last = (f"{_tokens(row)}\n{_cache(row)}", _writing(row))
            time += _within(row.costs.scoring_seconds) if wide else ""
        elif cached:
            last = (f"{_tokens(row)}\n{_cache(row)}", _scoring(row))
        elif reduction:
            last = (_tokens(row), _scoring(row))
        table.add_row(
            Text(row.label, style="bold" if row.label in conclusion.chosen else ""),
            _quality(row, conclusion, spread=wide),
            _differences(row, conclusion.decimals),
            *((_flops(row),) if counted else ()),
            time,
            *(last if wide else ()),
        )
    return table


def _heading(conclusion: Conclusion) -> str:
    measure = conclusion.measure
    return measure.unit if not conclusion.brief else f"{measure.name.replace(' ', chr(10), 1)}\n{measure.unit}"


def _quality(row: Row, conclusion: Conclusion, spread: bool) -> str:
    if row.quality is None:
        return "–"
    around = "" if row.spread is None or not spread else f" ±{plain(row.spread, conclusion.decimals)}"
    brief = [
        f"\n{measure.name} {plain(row.details[measure], measure.decimals or conclusion.decimals)}"
        for measure in conclusion.brief
        if measure in row.details
    ]
    return plain(row.quality, conclusion.decimals) + around + "".join(brief)


def _differences(row: Row, decimals: int) -> Text:
    text = Text(row.verdict, style=_STYLES.get(row.verdict, ""))
    if row.versus_baseline is not None and row.versus_baseline.finite:
        text = Text.assemble(f"{_interval(row.versus_baseline, decimals)}\n", text)
    if row.versus_control is not None:
        text.append(f"\n{_interval(row.versus_control, decimals)}\nagainst {row.control}", style="dim")
    return text


def _interval(interval: Interval, decimals: int) -> str:
    mean, low, high = (signed(value, decimals) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _flops(row: Row) -> str:
    own = "–" if row.costs.flops is None else amount(row.costs.flops)
    if row.reference_costs is not None:
        own += "\n+ ref " + ("–" if row.reference_costs.flops is None else amount(row.reference_costs.flops))
    return own if row.relative_flops is None else f"{own}\n= {ratio(row.relative_flops)}"


def _seconds(row: Row) -> str:
    if row.costs.wall_seconds is None:
        return "–"
    if not row.costs.seconds_comparable:
        return "not comparable"
    own = duration(row.costs.wall_seconds)
    if row.costs.dense_seconds is not None and row.relative_seconds is not None:
        own += f"\n= {ratio(row.relative_seconds)}"
    if row.reference_costs is None:
        return own
    reference = row.reference_costs.wall_seconds
    return f"{own}\n+ ref {'–' if reference is None else duration(reference)}"


def _writing(row: Row) -> str:
    if row.costs.decode_seconds is None:
        return "–"
    if row.relative_decode_seconds is None:
        return "not comparable"
    own = f"{duration(row.costs.decode_seconds)}\n= {ratio(row.relative_decode_seconds)}"
    return own + _within(row.costs.decode_scoring_seconds)


def _within(scoring: float | None) -> str:
    return "" if scoring is None else f"\n({duration(scoring) if scoring else 'none'})"


def _memory(row: Row) -> str:
    return "–" if row.costs.peak_memory_bytes is None else memory(row.costs.peak_memory_bytes)


def _tokens(row: Row) -> str:
    return "–" if row.costs.tokens_after is None else plain(row.costs.tokens_after, 0)


def _cache(row: Row) -> str:
    return "–" if row.costs.cache_bytes is None else memory(row.costs.cache_bytes)


def _scoring(row: Row) -> str:
    return "–" if row.costs.scoring_seconds is None else duration(row.costs.scoring_seconds)
