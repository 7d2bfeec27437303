"""Draws a text with the weight of every token: in a terminal in colour, as plain numbers, or as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Low weights fade into grey, which stands back on dark and on light terminals alike; high ones are orange,
# those below 0 blue.
_LOW, _HIGH, _BELOW = (112, 112, 112), (255, 138, 40), (82, 160, 255)

EXPLAINED = {
    "weight": "",
    "factor": "factor of the gradient of the token's loss; below 0 the loss is raised",
    "gradient": "norm of the gradient at the token's logits; below 0 the token is made less likely",
}
"""What a drawing says of its numbers, by what they are; see `tokenwise.weighting.objective_weights.Quantity`."""


@dataclass(frozen=True)
class TokenView:
    """A text as a method sees it; the sequences have one item per token.

    Args:
        title: which method with which fields, on which model.
        tokens: the text of each token; joined they are the whole text.
        weights: weight of each token's loss; None for a token that is not learnt: the first, and prompts.
        nll: negative log-likelihood of each token in nats; None where the weight is None.
        prompt_attention: share of its attention that each token pays to the prompt; None where the method does not
            ask.
        quantity: what the weights are; a key of `EXPLAINED`.
    """

    title: str
    tokens: Sequence[str]
    weights: Sequence[float | None]
    nll: Sequence[float | None]
    prompt_attention: Sequence[float | None] | None = None
    quantity: str = "weight"

    @property
    def has_prompt(self) -> bool:
        """Whether tokens beside the first are read without being learnt."""
        return any(weight is None for weight in self.weights[1:])

    @property
    def largest(self) -> float:
        """The largest absolute weight."""
        return max((abs(weight) for weight in self.weights if weight is not None), default=0.0)

    @property
    def steps(self) -> list[float]:
        """Five weights for the legend, from the lowest that could be drawn to the highest."""
        known = [weight for weight in self.weights if weight is not None]
        low = -self.largest if any(weight < 0 for weight in known) else 0.0
        high = self.largest if any(weight > 0 for weight in known) else 0.0
        return [low + (high - low) * step / 4 for step in range(5)]

    def strength(self, weight: float) -> float:
        """The weight as a share of the largest one, in [-1, 1]."""
        return weight / self.largest if self.largest > 0 else 0.0

    def summary(self) -> str:
        """Count, mean weight, share of tokens with a weight, and mean loss, in one line."""
        weights = [weight for weight in self.weights if weight is not None]
        above, below = (sum(sign * weight > 0 for weight in weights) / len(weights) for sign in (1, -1))
        parts = [
            f"{len(weights)} {'learnt' if self.has_prompt else 'predicted'} tokens",
            f"mean {self.quantity} {_mean(self.weights)}",
            f"{above:.0%} with a {self.quantity} above 0",
        ]
        if self.quantity != "weight":
            parts.append(f"{below:.0%} below 0")
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
    if has_colours(console):
        _print_colours(console, view)
    else:
        _print_numbers(console, view)


def has_colours(console: Console) -> bool:
    """Whether colours would be seen."""
    return console.color_system is not None and not console.no_color


def _print_numbers(console: Console, view: TokenView) -> None:
    names, columns = [view.quantity, "nats"], [view.weights, view.nll]
    if view.prompt_attention is not None:
        names.append("prompt")
        columns.append(view.prompt_attention)
    lines = [view.title, "".join(f"{name:>8}" for name in names) + "  token"]
    if EXPLAINED[view.quantity]:
        lines.insert(1, f"{view.quantity}: {EXPLAINED[view.quantity]}")
    for token, *values in zip(view.tokens, *columns, strict=True):
        lines.append("".join(f"{_number(value):>8}" for value in values) + f"  {token!r}")
    lines.append(view.summary())
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_colours(console: Console, view: TokenView) -> None:
    from rich.text import Text

    console.print(Text(view.title, "bold"))
    console.print()
    console.print(coloured(view.tokens, [_style(view, weight) for weight in view.weights]))
    console.print()
    console.print(_legend(view))
    console.print(view.summary(), highlight=False)


def coloured(tokens: Sequence[str], styles: Sequence[str]) -> Text:
    """A text, each token in its style."""
    from rich.text import Text

    text = Text(overflow="fold")
    for token, style in zip(tokens, styles, strict=True):
        text.append(token.replace("\n", "↵\n"), style)
    return text


def _legend(view: TokenView) -> Text:
    from rich.text import Text

    legend = Text(f"{view.quantity} ")
    for weight in view.steps:
        legend.append(f" {_number(weight)} ", _style(view, weight))
    if view.has_prompt:
        legend.append("  ").append("read, not learnt", _style(view, None))
    else:
        legend.append("  the first token is not predicted and has none")
    if EXPLAINED[view.quantity]:
        legend.append(f"\n{EXPLAINED[view.quantity]}")
    return legend


def _style(view: TokenView, weight: float | None) -> str:
    if weight is None:
        return "dim italic" if view.has_prompt else ""
    if weight == 0:
        return "dim"
    return colour(view.strength(weight))


def colour(strength: float) -> str:
    """Rich's style for a share of the largest weight, in [-1, 1]."""
    share = abs(strength)
    full = _HIGH if strength > 0 else _BELOW
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(_LOW, full, strict=True))
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
            "share": None if weight is None else round(100 * abs(view.strength(weight))),
            "below": weight is not None and weight < 0,
            "nll": _number(loss),
            "attention": _number(attention),
        }
        for token, weight, loss, attention in zip(view.tokens, view.weights, view.nll, attended, strict=True)
    ]
    steps = [
        {"share": round(100 * abs(view.strength(weight))), "below": weight < 0, "weight": _number(weight)}
        for weight in view.steps
    ]
    meaning = EXPLAINED[view.quantity]
    page = environment.get_template("explain.html").render(view=view, rows=rows, steps=steps, meaning=meaning)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
