"""Draws a text with the weight of every token: in a terminal in colour, as plain numbers, or as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Low weights fade into grey, which stands back on dark and on light terminals alike; high ones are orange.
_LOW, _HIGH = (112, 112, 112), (255, 138, 40)


@dataclass(frozen=True)
class TokenView:
    """A text as a method sees it; the sequences have one item per token.

    Args:
        title: which method with which fields, on which model.
        tokens: the text of each token; joined they are the whole text.
        weights: weight of each token's loss, at least 0; None for a token that is not learnt: the first, and prompts.
        nll: negative log-likelihood of each token in nats; None where the weight is None.
        prompt_attention: share of its attention that each token pays to the prompt; None where the method does not
            ask.
    """

    title: str
    tokens: Sequence[str]
    weights: Sequence[float | None]
    nll: Sequence[float | None]
    prompt_attention: Sequence[float | None] | None = None

    @property
    def has_prompt(self) -> bool:
        """Whether tokens beside the first are read without being learnt."""
        return any(weight is None for weight in self.weights[1:])

    @property
    def largest(self) -> float:
        return max((weight for weight in self.weights if weight is not None), default=0.0)

    def strength(self, weight: float) -> float:
        """The weight as a share of the largest one, in [0, 1]."""
        return weight / self.largest if self.largest > 0 else 0.0

    def summary(self) -> str:
        """Count, mean weight, share of tokens with a weight above 0, and mean loss, in one line."""
        weights = [weight for weight in self.weights if weight is not None]
        kept = sum(weight > 0 for weight in weights) / len(weights)
        parts = [
            f"{len(weights)} {'learnt' if self.has_prompt else 'predicted'} tokens",
            f"mean weight {_mean(self.weights)}",
            f"{kept:.0%} with a weight above 0",
        ]
        if any(loss is not None for loss in self.nll):
            parts.append(f"mean loss {_mean(self.nll)} nats/token")
        if self.prompt_attention is not None:
            parts.append(f"mean attention to the prompt {_mean(self.prompt_attention)}")
        return ", ".join(parts)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3g}"


def print_view(console: Console, view: TokenView) -> None:
    """Print in colour where the console has colours, as one line of numbers per token where it has none."""
    if console.color_system is None or console.no_color:
        _print_numbers(console, view)
    else:
        _print_colours(console, view)


def _print_numbers(console: Console, view: TokenView) -> None:
    names, columns = ["weight", "nats"], [view.weights, view.nll]
    if view.prompt_attention is not None:
        names.append("prompt")
        columns.append(view.prompt_attention)
    lines = [view.title, "".join(f"{name:>8}" for name in names) + "  token"]
    for token, *values in zip(view.tokens, *columns, strict=True):
        lines.append("".join(f"{_number(value):>8}" for value in values) + f"  {token!r}")
    lines.append(view.summary())
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_colours(console: Console, view: TokenView) -> None:
    from rich.text import Text

    console.print(Text(view.title, "bold"))
    console.print()
    text = Text(overflow="fold")
    for token, weight in zip(view.tokens, view.weights, strict=True):
        text.append(token.replace("\n", "↵\n"), _style(view, weight))
    console.print(text)
    console.print()
    console.print(_legend(view))
    console.print(view.summary(), highlight=False)


def _legend(view: TokenView) -> Text:
    from rich.text import Text

    legend = Text("weight ")
    for step in range(5):
        weight = view.largest * step / 4
        legend.append(f" {_number(weight)} ", _style(view, weight))
    if view.has_prompt:
        return legend.append("  ").append("read, not learnt", _style(view, None))
    return legend.append("  the first token is not predicted and has none")


def _style(view: TokenView, weight: float | None) -> str:
    if weight is None:
        return "dim italic" if view.has_prompt else ""
    if weight == 0:
        return "dim"
    share = view.strength(weight)
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(_LOW, _HIGH, strict=True))
    return f"{'black' if share > 0.4 else 'white'} on #{red:02x}{green:02x}{blue:02x}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def write_html(path: Path, view: TokenView) -> None:
    """Write one self-contained page that reads the same with a light and a dark background.

    Raises:
        OSError: when `path` cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("tokenwise.cli", "."), autoescape=True)
    attended = view.prompt_attention or [None] * len(view.tokens)
    rows = [
        {
            "text": token.replace("\n", "↵\n"),
            "weight": _number(weight),
            "share": None if weight is None else round(100 * view.strength(weight)),
            "nll": _number(loss),
            "attention": _number(attention),
        }
        for token, weight, loss, attention in zip(view.tokens, view.weights, view.nll, attended, strict=True)
    ]
    steps = [{"share": 25 * step, "weight": _number(view.largest * step / 4)} for step in range(5)]
    page = environment.get_template("explain.html").render(view=view, rows=rows, steps=steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
