"""Draws labelled texts with the weight of each: a table in a terminal, or an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenwise.cli.token_view import colour

if TYPE_CHECKING:
    from rich.console import Console

MEANING = "weight: size of the gradient at the example's logits, relative to plain cross-entropy"
_TEXT = 60


@dataclass(frozen=True)
class ExampleRow:
    """A labelled text.

    Args:
        text: the text.
        label: its class, or its classes.
        weight: what the method makes of it; None where plain cross-entropy has no gradient to compare with.
        loss: plain cross-entropy in nats.
    """

    text: str
    label: str
    weight: float | None
    loss: float

    @property
    def line(self) -> str:
        """The beginning of the text, in one line."""
        text = " ".join(self.text.split())
        return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


@dataclass(frozen=True)
class ExampleView:
    """Examples as a method sees them.

    Args:
        title: which method with which fields, on which model.
        rows: the examples.
        examples: how many the data has in all.
        cut: how many of the texts were cut to what the model reads.
        starts: whether the method learns while it trains, so that these are only the weights of the beginning.
    """

    title: str
    rows: Sequence[ExampleRow]
    examples: int
    cut: int = 0
    starts: bool = False

    def strength(self, weight: float | None) -> float:
        """The weight as a share of the largest one, in [0, 1]."""
        largest = max((row.weight for row in self.rows if row.weight is not None), default=0.0)
        return weight / largest if weight is not None and largest > 0 else 0.0

    def summary(self) -> str:
        """Count and mean weights, in one line."""
        known = [row for row in self.rows if row.weight is not None]
        parts = [f"{len(self.rows)} examples" if len(self.rows) == self.examples else self._first()]
        if known:
            parts.append(f"mean weight {_mean(known)}")
            labels = sorted({row.label for row in known})
            if 1 < len(labels) <= 8:
                parts += [f"of {label} {_mean([row for row in known if row.label == label])}" for label in labels]
        parts.append(f"mean loss {sum(row.loss for row in self.rows) / len(self.rows):.3g} nats")
        if self.cut:
            parts.append(f"{self.cut} cut to what the model reads")
        if self.starts:
            parts.append("as at the start of a training: the method learns its weights on the way")
        return ", ".join(parts)

    def _first(self) -> str:
        return f"the first {len(self.rows)} of {self.examples} examples"


def _mean(rows: Sequence[ExampleRow]) -> str:
    return f"{sum(row.weight or 0.0 for row in rows) / len(rows):.3g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def print_examples(console: Console, view: ExampleView) -> None:
    """Print one line per example; the weights in colour where the console has colours."""
    from rich.text import Text

    coloured = console.color_system is not None and not console.no_color
    width = max(5, *(len(row.label) for row in view.rows))
    console.print(Text(view.title, "bold"), soft_wrap=True)
    console.print(Text(MEANING), soft_wrap=True)
    console.print(Text(f"{'weight':>8}{'nats':>8}  {'label':<{width}}  text"), soft_wrap=True)
    for row in view.rows:
        line = Text()
        style = colour(view.strength(row.weight)) if coloured and row.weight else ""
        line.append(f"{_number(row.weight):>8}", style)
        line.append(f"{_number(row.loss):>8}  {row.label:<{width}}  {row.line}")
        console.print(line, soft_wrap=True)
    console.print(view.summary(), markup=False, highlight=False, soft_wrap=True)


def write_examples(path: Path, view: ExampleView) -> None:
    """Write one self-contained page that reads the same with a light and a dark background.

    Raises:
        OSError: when `path` cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("tokenwise.cli", "."), autoescape=True)
    rows = [
        {
            "text": row.text,
            "label": row.label,
            "weight": _number(row.weight),
            "nll": _number(row.loss),
            "share": round(100 * view.strength(row.weight)),
        }
        for row in view.rows
    ]
    page = environment.get_template("explain_examples.html").render(view=view, rows=rows, meaning=MEANING)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
