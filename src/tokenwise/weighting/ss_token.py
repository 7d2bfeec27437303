"""ssToken: selection by what the model has learnt already and by attention to the prompt."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.method import Card, Paper
from tokenwise.models.average import ParameterAverage
from tokenwise.policies.selection import top_ceiling
from tokenwise.signals.scaling import min_max
from tokenwise.weighting.base import Reduction, Run, State, TokenBatch, TokenWeighter

_PAPER = Paper(
    title="ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning",
    arxiv="2510.18250",
    venue="ICLR 2026",
)


class _SsToken(TokenWeighter):
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "reference_nll", "prompt_attention"})
    reduction: ClassVar[Reduction] = "nonzero_mean"
    selects: ClassVar[bool] = True
    scope: ClassVar[str] = "sequence"

    keep: float = Field(0.6, gt=0, le=1)
    """The share that stays of each sequence's labels, rounded up (rho in the paper)."""
    gamma: float = Field(0.5, ge=0, le=1)
    """Share of the loss difference in the score; the rest is attention to the prompt."""
    warm_up: int = Field(0, ge=0)
    """Optimizer steps at the start that select by attention alone; the official code does so for its first 10000
    samples."""

    def _selection(self, batch: TokenBatch, history_nll: Tensor) -> Tensor:
        assert batch.nll is not None
        assert batch.prompt_attention is not None
        gamma = 0.0 if batch.step < self.warm_up else self.gamma
        learnt = min_max(history_nll - batch.nll, batch.sequence, batch.sequences)
        score = gamma * learnt + (1 - gamma) * batch.prompt_attention
        return top_ceiling(score, self.keep, batch.sequence).float()


class SsToken(_SsToken):
    """Train on the response tokens that the model has improved on since the base model, and that attend to the prompt.

    The improvement (base model's loss minus the current one) is mapped to [0, 1] within each sequence; attention is
    the share of the last layer's that the token pays to tokens without a label. The top share of their mix trains.

    A token that has got worse scores lowest, so what training harms is not repaired: take small steps from a trained
    model, as the paper does with adapters; a small model trained hard forgets what is left out.
    """

    card: ClassVar[Card] = Card(
        id="weighting/ss_token",
        paper=_PAPER,
        needs=("the base model as reference", "sequences with unlabelled prompts"),
        status="VERIFIED",
        checked="worked numbers of the official selection; attention rows against transformers' eager attention",
        control="weighting/random",
    )

    reference: str
    """The model before training: a local directory, a hub id, or in a plan the name of one of its references."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.reference_nll is not None
        return self._selection(batch, batch.reference_nll)


class SsTokenAverage(_SsToken):
    """ssToken whose history is a running average of the model's own parameters, so that it moves along.

    Costs a second forward pass, and 4 bytes of memory for each parameter that trains.
    """

    card: ClassVar[Card] = Card(
        id="weighting/ss_token_average",
        paper=_PAPER,
        needs=("sequences with unlabelled prompts", "whole parameters on each device (no FSDP)"),
        status="RECONSTRUCTION",
        checked="the average in fp64; the paper names this history, its decay is ours",
        control="weighting/random",
    )

    needs_whole_parameters: ClassVar[bool] = True

    decay: float = Field(0.99, ge=0, lt=1)
    """Share of the average that stays in each optimizer step."""

    def start(self, run: Run) -> ParameterAverage:
        assert run.model is not None
        return ParameterAverage(run.model, self.decay)

    def has_reference(self) -> bool:
        return True

    def open_reference(  # type: ignore[override]
        self, model: object, state: ParameterAverage, tokenizer: object = None
    ) -> ParameterAverage:
        return state

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.reference_nll is not None
        return self._selection(batch, batch.reference_nll)


class SsTokenPreviousEpoch(_SsToken):
    """ssToken whose history is the loss that each token had when its sample was last trained on.

    A sample seen for the first time has no history, and its tokens are selected by attention alone. Keeps 4 bytes
    per label of the data set in main memory, on each process for the samples it saw.
    """

    card: ClassVar[Card] = Card(
        id="weighting/ss_token_previous_epoch",
        paper=_PAPER,
        needs=("sequences with unlabelled prompts", "a column sample_id", "several epochs on one process"),
        status="RECONSTRUCTION",
        checked="the selection as in ss_token; the history of the previous epoch is ours",
        control="weighting/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"nll", "prompt_attention", "sample_id"})

    def start(self, run: Run) -> LossHistory:
        return LossHistory()

    def weights(self, batch: TokenBatch, state: LossHistory) -> Tensor:  # type: ignore[override]
        assert batch.nll is not None
        assert batch.sample_id is not None
        history = batch.nll.clone()
        for index in range(batch.sequences):
            tokens = (batch.sequence == index).nonzero().squeeze(1)
            sample = int(batch.sample_id[tokens[0]])
            history[tokens] = state.exchange(sample, batch.nll[tokens])
        return self._selection(batch, history)


class LossHistory:
    """The losses of each sample's labels when it was last seen.

    Raises:
        InputError: on several processes, between which samples wander.
    """

    def __init__(self) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise InputError(
                Problem(
                    "method",
                    "keeps the losses of the samples that a process saw, and each epoch deals them out anew.",
                    "Train on one process, or use ss_token or ss_token_average.",
                )
            )
        self.losses: dict[int, Tensor] = {}

    def exchange(self, sample: int, losses: Tensor) -> Tensor:
        """Store the losses of a sample's labels, [labels], and return the ones before; these ones at first sight.

        Raises:
            InputError: when the sample has another number of labels than before.
        """
        before = self.losses.get(sample)
        self.losses[sample] = losses.detach().float().cpu()
        if before is None:
            return losses
        if before.shape != losses.shape:
            raise InputError(
                Problem(
                    "sample_id",
                    f"sample {sample} has {losses.shape[0]} labels, and had {before.shape[0]} when last seen.",
                    "Give each sample one id of its own, and the same tokens in every epoch.",
                )
            )
        return before.to(losses)

    def tensors(self) -> dict[str, Tensor]:
        """Ids, lengths and losses of all samples, one after another."""
        lengths = [losses.shape[0] for losses in self.losses.values()]
        return {
            "samples": torch.tensor(list(self.losses), dtype=torch.int64),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "losses": torch.cat([torch.empty(0), *self.losses.values()]),
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        parts = tensors["losses"].split(tensors["lengths"].tolist())
        self.losses = dict(zip(tensors["samples"].tolist(), parts, strict=True))
