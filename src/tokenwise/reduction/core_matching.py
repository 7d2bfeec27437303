"""Image tokens by the neurons they share with the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.method import Card, Paper
from tokenwise.reduction.staged import StagedReducer

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.reduction.base import DecoderTokens, Stay


class CoreMatching(StagedReducer):
    """Keeps, from one layer of the language model on, the image tokens that share most active neurons of the layer
    before with the prompt's last token: those above the elbow of the sorted counts."""

    card: ClassVar[Card] = Card(
        id="reduction/core_matching",
        paper=Paper(
            title="CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for "
            "Comprehensive Acceleration of Vision-Language Models",
            arxiv="2505.19235",
            venue="ICML 2025",
        ),
        needs=("a vision-language model",),
        status="RECONSTRUCTION",
        checked="its counts and elbow by hand; tokens are dropped, where the official code sets their keys and values "
        "to zero, and the sparse feed-forward layer is left out",
        control="reduction/random_decoder",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"hidden"})
    paper_ratios: ClassVar[tuple[float, ...]] = (0.5,)

    place: Annotated[float, Field(gt=0, lt=1)] = 5 / 32
    """Where in the depth tokens are dropped, as a share of it: before layer 5 of 32, counted from 0."""
    elbow: bool = True
    """Whether fewer stay than the budget allows where the elbow of the sorted counts says so."""

    def starts(self, layers: int) -> list[int]:
        return [min(max(int(self.place * layers + 0.5), 1), layers - 1)]

    def watched(self, layers: int) -> dict[str, tuple[int, ...]]:
        return {"neurons": (self.starts(layers)[0] - 1,)}

    def see_neurons(self, tokens: DecoderTokens, activation: Tensor) -> None:
        from tokenwise.signals.transitions import neuron_overlap

        tokens.memory["shared"] = neuron_overlap(activation, tokens.last())

    def score(self, tokens: DecoderTokens) -> Tensor:
        return tokens.memory["shared"].float()

    def choose(self, tokens: DecoderTokens, counts: Tensor) -> Stay:
        import torch

        from tokenwise.policies.elbow import above_elbow

        stay = super().choose(tokens, counts)
        if self.elbow:
            score = self.score(tokens)
            for row, candidates in enumerate(tokens.candidates):
                if bool(candidates.any()):
                    above = torch.zeros_like(candidates).masked_scatter(candidates, above_elbow(score[row, candidates]))
                    stay.candidates[row] &= above
        return stay
