"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from markupsafe import Markup

from tokenwise.comparison import charts, figures
from tokenwise.comparison.answer import Conclusion, Row
from tokenwise.comparison.formatting import listing, plain, signed
from tokenwise.comparison.quality import Measure
from tokenwise.comparison.records import Result
from tokenwise.comparison.statistics import LEVEL, RESAMPLES, Interval
from tokenwise.comparison.wording import Column, multiple, wording
from tokenwise.files import write_text

_HERE = Path(__file__).parent
SHOWN_TOKENS = 400
"""Longer examples are cut here."""


def write_report(
    path: Path,
    conclusion: Conclusion,
    results: Sequence[Result],
    plan_text: str,
    plan_summary: Mapping[str, Any],
) -> None:
    """Write the report as one self-contained HTML file: offline, light and dark, narrow and wide, printable.

    Args:
        path: the file to write; it appears whole or not at all.
        conclusion: what `conclude` made of the results.
        results: of every job; curves, examples and versions are read.
        plan_text: the plan as the user wrote it.
        plan_summary: ``task``, ``model``, ``data``, ``budget``, ``seeds``, ``baseline``, ``plan_file``, ``command``
            and ``folder``, as texts (``seeds`` a list). Nothing in it is trusted.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = _styles(conclusion)
    words = wording(conclusion.family, conclusion.item)

    def say(text: str) -> str:
        labels = "labels" if conclusion.measure.unit == "nats/token" else "tokens"
        return text.format(
            item=conclusion.item, baseline=conclusion.baseline, budget=plan_summary["budget"], labels=labels
        )

    html = environment.get_template("report.html").render(
        conclusion=conclusion,
        plan=plan_summary,
        plan_text=plan_text,
        css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        styles=styles,
        key=lambda label: Markup(_key(styles[label])),
        cost_figures=_cost_figures(conclusion, styles),
        curve_figures=_curve_figures(conclusion, results, styles),
        depth_figures=_depth_figures(conclusion, results),
        goals=_drawings([figures.goals_figure(conclusion, results, styles, wide) for wide in (True, False)]),
        goal_measures=next((_goals(result) for result in results if _goals(result)), ()),
        weights=_weights(conclusion, results, styles),
        differences=_drawings([figures.difference_figure(conclusion, styles, wide) for wide in (True, False)]),
        examples=_examples(conclusion, results),
        pictures=_pictures(conclusion, results),
        words=words,
        say=say,
        legend=_legend(conclusion),
        versions=_versions(results),
        value=lambda value, decimals=None: "–" if value is None else plain(value, decimals or conclusion.decimals),
        details=next((list(row.details) for row in conclusion.rows if row.details), []),
        parts=next((list(row.groups) for row in conclusion.rows if row.groups), []),
        difference=lambda value: signed(value.mean, conclusion.decimals),
        interval=lambda value: _interval(value, conclusion.decimals),
        costs=_costs,
        settings=lambda row: _settings(row, conclusion),
        level=LEVEL,
        resamples=RESAMPLES,
        unmeasured=_unmeasured(conclusion),
    )
    write_text(path, html)


def _key(style: charts.Style) -> str:
    return (
        '<svg class="key" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">'
        f"{charts.marker(style.shape, 0, 0, f'marker {style.colour}')}</svg>"
    )


def _styles(conclusion: Conclusion) -> dict[str, charts.Style]:
    """A style for each label; one method at several budgets has one."""
    found = charts.styles([(row.series or row.label, row.role) for row in _legend(conclusion)])
    return {row.label: found[row.series or row.label] for row in conclusion.rows}


def _legend(conclusion: Conclusion) -> list[Row]:
    """One row for each method, whatever its budgets."""
    first: dict[str, Row] = {}
    for row in conclusion.rows:
        first.setdefault(row.series or row.label, row)
    return list(first.values())


def _drawings(drawings: Sequence[str | None]) -> Markup | None:
    """The wide and the narrow drawing of a figure; the style sheet shows the one that fits."""
    return None if None in drawings else Markup("".join(drawing for drawing in drawings if drawing))


def _cost_figures(conclusion: Conclusion, styles: Mapping[str, charts.Style]) -> list[dict[str, Any]]:
    found = []
    for measure in figures.MEASURES:
        title = figures.title_of(conclusion, measure)
        for way in conclusion.ways or ("",):
            drawings = _drawings(
                [figures.cost_figure(conclusion, styles, measure, wide, way) for wide in (True, False)]
            )
            if drawings is not None:
                found.append({"title": f"{title}, question {way}" if way else title, "drawings": drawings})
    return found


def _depth_figures(conclusion: Conclusion, results: Sequence[Result]) -> list[dict[str, Any]]:
    found = []
    for way in conclusion.ways or ("",):
        drawings = _drawings([figures.depth_figure(conclusion, results, way, wide) for wide in (True, False)])
        if drawings is not None:
            found.append({"title": f"Question {way}" if way else "All", "drawings": drawings})
    return found


def _curve_figures(
    conclusion: Conclusion, results: Sequence[Result], styles: Mapping[str, charts.Style]
) -> list[dict[str, Any]]:
    found = []
    for start, title in ((0.5, "Second half"), (0.0, "Whole run")):
        both = [figures.curve_figure(conclusion, results, styles, start, wide) for wide in (True, False)]
        drawings = _drawings(both)
        if drawings is not None:
            found.append({"title": title, "drawings": drawings})
    return found


def _interval(interval: Interval, decimals: int) -> str:
    if not interval.finite:
        return "not finite"
    return f"{plain(interval.low, decimals)} to {plain(interval.high, decimals)}"


def _costs(row: Row, column: Column) -> Markup:
    """A cost of the method's own, and below it what its reference adds (memory does not add up)."""
    text = Markup("{}").format(column.show(getattr(row.costs, column.name)) if row.finished else "–")
    if row.reference_costs is not None and column.adds:
        text += Markup(" <small>+ {}</small>").format(column.show(getattr(row.reference_costs, column.name)))
    if column.relative and row.finished:
        text += Markup(" <small>{}</small>").format(multiple(getattr(row, column.relative)))
    for name, show in column.below:
        if getattr(row.costs, name) is not None:
            text += Markup(" <small>{}</small>").format(show(getattr(row.costs, name)))
    if column.name == "wall_seconds" and not row.costs.seconds_comparable:
        text += Markup(" <small>not comparable</small>")
    return text


def _settings(row: Row, conclusion: Conclusion) -> str:
    if conclusion.trains:
        return ", ".join(f"{name} {value}" for name, value in row.settings.items())
    # A budget of the plan is in the label, a field left empty says nothing, and what stands for everything that is left
    # out has the family's defaults.
    base = [other for other in conclusion.rows if other.label == conclusion.baseline]
    usual = base[0].settings if base and base[0].costs.token_share == 1 and base[0].costs.tokens_read is None else {}
    shown = {
        name: value
        for name, value in row.settings.items()
        if name not in ("keep", "seed") and value is not None and (name not in usual or usual[name] != value)
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _examples(conclusion: Conclusion, results: Sequence[Result]) -> dict[str, Any] | None:
    """What each method did to the example, in its first finished run, on one scale for all."""
    first: dict[str, Result] = {}
    for result in results:
        if result.job.kind == "run" and "tokens" in (result.example or {}) and result.status == "finished":
            first.setdefault(result.job.label, result)
    if not first:
        return None
    weights = [w for result in first.values() for w in (result.example or {})["weights"] if w is not None]
    # One scale for all methods, up to twice the plain weight: a few extreme weights must not pale all others.
    top = min(max([*weights, 1.0]), 2.0)
    shown = []
    for row in conclusion.rows:
        if row.label in first:
            result = first[row.label]
            example = result.example or {}
            pairs = list(zip(example["tokens"], example["weights"], strict=True))
            shown.append(
                {
                    "label": row.label,
                    "seed": result.job.seed,
                    "tokens": [_token(token, weight, top) for token, weight in pairs[:SHOWN_TOKENS]],
                    "cut": len(pairs) - SHOWN_TOKENS,
                    "shares": _shares(result.weights),
                }
            )
    over = any(weight > top for weight in weights)
    missing = [row.label for row in conclusion.rows if row.finished and row.label not in first]
    return {
        "methods": shown,
        "top": f"{top:.2g}" + (" or more" if over else ""),
        "missing": listing(missing) if missing else "",
    }


def _pictures(conclusion: Conclusion, results: Sequence[Result]) -> list[dict[str, Any]]:
    """What each method kept of a few images, in its first finished run."""
    first: dict[str, Result] = {}
    for result in results:
        if result.status == "finished" and result.example and "pictures" in result.example:
            first.setdefault(result.job.label, result)
    if not first:
        return []
    from tokenwise.comparison.pictures import draw, encode

    shown = []
    for row in conclusion.rows:
        if row.label in first:
            drawn = [
                {
                    **picture,
                    "drawn": encode(draw(picture)),
                    "kept": len({name for name in picture["group"] if name >= 0}),
                }
                for picture in (first[row.label].example or {})["pictures"]
            ]
            shown.append({"label": row.label, "seed": first[row.label].job.seed, "pictures": drawn})
    return shown


def _shares(weights: Mapping[str, float]) -> str:
    """How a method spread its weight over training, in words."""
    names = {"kept_share": "of the tokens weighted", "effective_sample_size": "effective sample size"}
    return ", ".join(f"{weights[name]:.0%} {words}" for name, words in names.items() if name in weights)


def _goals(result: Result) -> tuple[Measure, ...]:
    """The two goals that this result was measured by; empty where there is one."""
    goals = result.quality.goals if result.quality is not None else None
    return () if goals is None else tuple(measure for measure, _ in goals)


def _weights(
    conclusion: Conclusion, results: Sequence[Result], styles: Mapping[str, charts.Style]
) -> list[dict[str, Any]]:
    """What each method's weights did to the training: means over its finished runs."""
    found = []
    for row in conclusion.rows:
        own = [
            result.weights
            for result in results
            if result.job.kind == "run" and result.job.label == row.label and result.status == "finished"
        ]
        names = set.intersection(*map(set, own)) if own else set()
        if not names:
            continue
        means = {name: fmean(weights[name] for weights in own) for name in names}
        shares = [means.get(f"gradient_share_decile_{decile}") for decile in range(1, 11)]

        def show(name: str, factor: float, decimals: int, means: Mapping[str, float] = means) -> str:
            return plain(factor * means[name], decimals) if name in means else "–"

        found.append(
            {
                "label": row.label,
                "mean": show("mean_weight", 1, 3),
                "effective": show("effective_sample_size", 100, 1),
                "kept": show("kept_share", 100, 1),
                "rate": show("effective_learning_rate", 1, 3),
                "top": show("gradient_share_decile_10", 100, 1),
                "deciles": _deciles([share for share in shares if share is not None], styles[row.label]),
            }
        )
    return found


def _deciles(shares: Sequence[float], style: charts.Style) -> Markup:
    """Ten small bars."""
    if len(shares) != 10 or not all(map(math.isfinite, shares)):
        return Markup("–")
    top = max(*shares, 0.2)
    bars = "".join(
        f'<rect x="{11 * place + 1}" y="{charts.number(29 - 28 * share / top)}" width="9" '
        f'height="{charts.number(28 * share / top)}"/>'
        for place, share in enumerate(shares)
    )
    even = charts.number(29 - 28 * 0.1 / top)
    label = "Shares of the gradient in %, smallest weights first: " + ", ".join(plain(100 * s, 0) for s in shares)
    return Markup(
        f'<svg class="deciles {style.colour}" viewBox="0 0 112 30" role="img" aria-label="{label}">'
        f'{bars}<path class="even" d="M0 {even}H112"/></svg>'
    )


def _token(token: str, weight: float | None, top: float) -> dict[str, Any]:
    visible = token.replace("\t", "→\t").replace("\r", "␍").replace("\n", "↵\n") or "∅"
    if weight is None:
        return {
            "text": visible,
            "share": None,
            "title": "not learnt: the first token, or one of a prompt",
            "kind": "none",
        }
    share = min(max(weight / top, 0.0), 1.0)
    return {
        "text": visible,
        "share": f"{share:.2f}",
        "title": f"weight {weight:.3g}",
        "kind": "dropped" if weight == 0 else "weighted",
    }


def _versions(results: Sequence[Result]) -> dict[str, str]:
    """Package versions and machine; where runs differ, all of them."""
    found: dict[str, list[str]] = {}
    for result in results:
        for name, value in result.versions.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: " / ".join(values) for name, values in found.items()}


def _unmeasured(conclusion: Conclusion) -> list[str]:
    """What this comparison does not say, beyond what no comparison says."""
    finished = [row for row in conclusion.rows if row.finished]
    found = []
    for name, title in (("flops", "FLOPs"), ("wall_seconds", "wall time"), ("peak_memory_bytes", "peak memory")):
        missing = [row.label for row in finished if getattr(row.costs, name) is None]
        if missing:
            found.append(f"{title} of {listing(missing)}")
    for name, title in (("flops", "FLOPs"), ("wall_seconds", "wall time on this machine")):
        references = [row for row in finished if row.reference_costs is not None]
        missing = [row.label for row in references if getattr(row.reference_costs, name) is None]
        if missing:
            found.append(f"{title} of the reference of {listing(missing)}")
    if finished and not conclusion.seconds_comparable:
        found.append("wall time in a comparable way (runs shared the machine)")
    return found
