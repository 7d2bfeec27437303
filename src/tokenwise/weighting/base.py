"""The two kinds of token weighters, and what they get to see."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from tokenwise.method import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tokenwise.models.reference import Reference

Scope = Literal["sequence", "micro_batch", "step"]
"""Within which tokens a policy ranks or normalises: one sequence, one micro-batch of one process, or the whole
optimizer step over all micro-batches and processes (the only one besides ``sequence`` whose result does not depend on
how the batch is split)."""

Reduction = Literal["token_mean", "weight_mean", "nonzero_mean", "sequence_mean"]
"""What the weighted sum is divided by, over the whole optimizer step: the number of labels, the sum of the weights, the
number of labels with a weight other than zero, or (each sequence's sum first divided by its length) the number of
sequences."""

Normalize = Literal["none", "mean"]
"""Whether a method divides by its own denominator, or every method by the sum of its weights, so that all take steps
as large as uniform weights do."""


@dataclass
class TokenBatch:
    """The tokens that have a label, one row each: no padding, no ignored positions, any batch layout.

    Every tensor has shape [tokens]; index t speaks of the same label everywhere. Only what the method names in
    `reads` is filled, the rest is None.

    Args:
        labels: label ids, int64.
        sequence: which sequence each token belongs to, int64, numbered 0 to `sequences` - 1 in order.
        sequences: how many sequences there are.
        step: optimizer steps finished before this one.
        nll: negative log-likelihood of the label under the current model, in nats, fp32.
        entropy: entropy of the current model's next-token distribution, in nats, fp32.
        reference_nll: as `nll`, under the method's reference model.
        loss_weights: the data's own column of weights, fp32.
        sample_id: which sample of the data set each token belongs to, int64, the same in every epoch.
        top_entropy: as `entropy`, of the 20 likeliest next tokens alone.
        base_nll: as `nll`, under the model that training started from.
        completion_mask: 1 for tokens of a completion, 0 for tokens of its prompt, int64.
        prompt_attention: share of the last layer's attention that the token, as a query, pays to tokens without a
            label before it, mean over heads, in [0, 1], fp32.
        difference: 1 where the token's text differs from a similar one, -1 where it is the similar one's differing
            token, 0 elsewhere, fp32.
    """

    labels: Tensor
    sequence: Tensor
    sequences: int
    step: int = 0
    nll: Tensor | None = None
    entropy: Tensor | None = None
    reference_nll: Tensor | None = None
    loss_weights: Tensor | None = None
    sample_id: Tensor | None = None
    top_entropy: Tensor | None = None
    base_nll: Tensor | None = None
    completion_mask: Tensor | None = None
    prompt_attention: Tensor | None = None
    difference: Tensor | None = None

    def groups(self, scope: Scope) -> Tensor | None:
        """The group of each token under `scope`: its sequence, or None where all tokens here are one group.

        A method of scope ``step`` is handed the tokens of the whole step, so both wider scopes are one group.
        """
        return self.sequence if scope == "sequence" else None

    def part(self, tokens: slice) -> TokenBatch:
        """Some of the tokens, sequences numbered as before."""
        tensors = {
            name: value for name, value in vars(self).items() if value is not None and not isinstance(value, int)
        }
        return replace(self, **{name: tensor[tokens] for name, tensor in tensors.items()})


class State(Protocol):
    """What a run of a method accumulates; saved with every checkpoint and restored on resume."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        ...


@dataclass
class Run:
    """What a method may know of the training run it starts in.

    Args:
        seed: seed of the run.
        rank: index of this process among the data-parallel ones.
        device: where the model is.
        model: the model in training.
    """

    seed: int = 0
    rank: int = 0
    device: torch.device | str = "cpu"
    model: PreTrainedModel | None = None


class TokenWeighter(Method):
    """Gives every labelled token a detached weight of at least zero; the loss is then the weighted cross-entropy.

    A subclass sets `reads`, `reduction` and `weights`. A field or class variable `scope` says within which tokens
    the weights are formed; without one each token stands for itself. The framework hands `weights` the micro-batch,
    or for the scope ``step`` all tokens of the optimizer step.
    """

    family: ClassVar[str] = "weighting"
    traits: ClassVar[tuple[str, ...]] = ("reads", "reduction", "selects", "kind")
    kind: ClassVar[str] = "weights"
    reads: ClassVar[frozenset[str]] = frozenset()
    """Which of the tensors of a `TokenBatch` the weights are made from; the others are left out."""
    reduction: ClassVar[Reduction] = "token_mean"
    selects: ClassVar[bool] = False
    """Whether the weights are 0 or 1, so that a random choice of as many is a fair control."""
    compares_sequences: ClassVar[bool] = False
    """Whether the weights depend on where a sequence ends whatever the scope, as those of whole sequences do."""
    negative: ClassVar[bool] = False
    """Whether the data's own weights may be below 0; otherwise such a column is refused before training."""

    def start(self, run: Run) -> State | None:
        """The state of a new run; None for methods that accumulate nothing."""
        return None

    def has_reference(self) -> bool:
        """Whether `open_reference` gives something, so that `reference_nll` need not be a column of the data."""
        return getattr(self, "reference", None) is not None

    def open_reference(
        self, model: PreTrainedModel, state: State | None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Reference | None:
        """What the model in training is measured against: by default what a field `reference` names, a model or a
        folder of token scores.

        Args:
            model: the model in training.
            state: what `start` gave.
            tokenizer: what tokenises the training data, where it is known; scores made with another one are refused.
        """
        path = getattr(self, "reference", None)
        if path is None:
            return None
        from tokenwise.scores.reference import open_reference

        return open_reference(path, model, tokenizer)

    @abstractmethod
    def weights(self, batch: TokenBatch, state: State | None) -> Tensor:
        """Weights of the tokens, shape [tokens], fp32, at least 0, without gradient."""


class PointwiseWeighter(TokenWeighter):
    """A weighter whose loss is a function of one token's own statistics: it runs inside the fused loss, in one pass."""

    kind: ClassVar[str] = "pointwise"
    reads: ClassVar[frozenset[str]] = frozenset({"nll"})

    @abstractmethod
    def pointwise(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The loss of each token and its derivative with respect to the token's `nll`, both of shape [tokens].

        A detached weight w(nll) gives (w * nll, w).
        """

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        """The weight each token's gradient gets: the derivative of its loss with respect to its nll."""
        return self.pointwise(batch)[1]
