"""Distributionally robust weights of the sequences."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tokenwise.method import Card, Paper
from tokenwise.policies.weights import group_mean, softmax_weights
from tokenwise.weighting.base import Reduction, State, TokenBatch, TokenWeighter


class KLDRO(TokenWeighter):
    """Weigh each sequence by the exponential of its mean loss: guard against the worst mixture of the data nearby.

    ``softmax(loss / temperature)`` over the sequences of the scope, averaging to 1: the weights that make the
    expected loss largest at a price of `temperature` for each nat of divergence from uniform weights. The gradient is
    that of ``temperature * log(mean(exp(loss / temperature)))`` over the sequences' mean losses.
    """

    card: ClassVar[Card] = Card(
        id="weighting/kldro",
        paper=Paper(
            title="Doubly Robust Instance-Reweighted Adversarial Training", arxiv="2308.00311", venue="ICLR 2024"
        ),
        needs=("several sequences in each scope",),
        status="VERIFIED",
        checked="the gradient of the log-mean-exp loss, in fp64; only the paper's weights in closed form, not its "
        "adversarial training, and the default temperature is ours",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll"})
    reduction: ClassVar[Reduction] = "sequence_mean"

    temperature: float = Field(1.0, gt=0)
    """Price of divergence in nats of loss (r in the paper): large is uniform, small trains on the worst sequence."""
    scope: Literal["micro_batch", "step"] = "micro_batch"
    """Over which sequences the weights are normalised."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.nll is not None
        losses = group_mean(batch.nll, batch.sequence, batch.sequences)
        return softmax_weights(losses, self.temperature)[batch.sequence]
