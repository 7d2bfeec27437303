"""Image tokens by how much the layers change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.reduction.staged import StagedReducer, mean_row, places_of

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.reduction.base import DecoderTokens


class TransPrune(StagedReducer):
    """Keeps, at three places in the language model, the image tokens that the layers so far changed most in length and
    direction and that the words behind the image would attend to."""

    card: ClassVar[Card] = Card(
        id="reduction/trans_prune",
        paper=Paper(
            title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
            arxiv="2507.20630",
            venue="CVPR 2026",
        ),
        needs=("a vision-language model",),
        status="VERIFIED",
        checked="the official code's transition of a branch, normalised row by row, a short fp64 reference of the "
        "score, and the dense model with the dropped tokens masked; tokens keep their positions",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"attention", "hidden"})
    paper_ratios: ClassVar[tuple[float, ...]] = (0.875, 0.625, 0.125)

    places: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (7 / 32, 9 / 32, 12 / 32)
    """Where in the depth tokens are dropped, as shares of it: before layers 7, 9 and 12 of 32, counted from 0."""
    attention: bool = True
    """Whether the attention of the words behind the image counts as much as the transitions."""

    def starts(self, layers: int) -> list[int]:
        return places_of(self.places, layers)

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        starts = self.starts(layers)
        return {"branch": tuple(range(starts[0] - 1, starts[-1]))}

    def see_branch(self, tokens: DecoderTokens, before: Tensor, after: Tensor) -> None:
        from tokenwise.signals.transitions import transition

        so_far = tokens.memory.get("transition", 0)
        tokens.memory["transition"] = so_far + transition(before, after, tokens.real)

    def score(self, tokens: DecoderTokens) -> Tensor:
        found = _shares(tokens.memory["transition"], tokens.candidates)
        if self.attention:
            found = found + _shares(mean_row(tokens.next_attention(), tokens.following()), tokens.candidates)
        return found


def _shares(score: Tensor, candidates: Tensor) -> Tensor:
    """Scores of the candidates of each row as shares of their sum."""
    score = score.masked_fill(~candidates, 0)
    total = score.sum(1, keepdim=True)
    made: Tensor = score / total.where(total > 0, 1)
    return made
