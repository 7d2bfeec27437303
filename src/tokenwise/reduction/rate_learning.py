"""Learning how many tokens each block drops and merges, the model's own weights untouched."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.encoders import Encoder, find_encoder
from tokenwise.models.tap import AttentionCall
from tokenwise.policies.matching import normalized
from tokenwise.policies.plans import Shape
from tokenwise.policies.rates import expected_count, rank_mask, rate_candidates, smallest_count
from tokenwise.reduction.allocation import shape_of
from tokenwise.reduction.diff_rate import DiffRate
from tokenwise.reduction.encoder import EncoderReduction
from tokenwise.reduction.plan import Plan

# Keys of weight 0 get this much, so that their weight's gradient exists; what it adds to a sum is below fp32's steps.
_HIDDEN = 1e-9


class RateLearning(EncoderReduction):
    """An encoder that hides the tokens it would take out, so that rates get a gradient; until `undo`.

    Attributes:
        theta: logits of the candidates, one parameter for dropping and one for merging of each block but the first,
            which stays dense; zeros at the beginning.
        macs_share: of the last pass, of the dense blocks' multiply-accumulates; with the gradient of the rates.
    """

    def __init__(self, encoder: Encoder, shape: Shape, granularity: int = 4):
        super().__init__(encoder, DiffRate(keep=1.0), masked=True)
        self.shape = shape
        self.candidates = rate_candidates(shape.tokens - shape.prefix, granularity)
        device = next(encoder.module.parameters()).device
        self.candidates = self.candidates.to(device)
        self.theta = [
            nn.Parameter(torch.zeros(2, len(self.candidates), device=device)) for _ in range(shape.layers - 1)
        ]
        self.macs_share = torch.ones((), device=device)

    def plan_of_rates(self) -> Plan:
        """The plan of the rates as they are."""
        rates = [[int(self._expected(theta[place])) for theta in self.theta] for place in (0, 1)]
        dropped_to, merged_to = ([self.shape.tokens, *counts] for counts in rates)
        return Plan.dropping_and_merging("diff_rate", self.shape.tokens, self.shape.prefix, dropped_to, merged_to)

    def _expected(self, theta: Tensor) -> Tensor:
        return expected_count(theta, self.candidates, self.shape.prefix)

    def _begin(self, hidden: Tensor, mask: Tensor | None) -> None:
        if hidden.shape[1] != self.shape.tokens:
            raise InputError(
                Problem(
                    "batches",
                    f"bring {hidden.shape[1]} tokens after {self.shape.tokens}.",
                    "Rates are learned for one size of input.",
                )
            )
        super()._begin(hidden, mask)
        self._shown = torch.ones(hidden.shape[:2], device=hidden.device)
        self._left = self.shape.tokens
        self._count = torch.tensor(float(self.shape.tokens), device=hidden.device)
        self._attended: list[Tensor] = []
        self._processed: list[Tensor] = []

    def _listen(self, index: int, call: AttentionCall) -> None:
        assert self.last is not None
        self._calls[index] = call
        if index > 1:
            call.add_key_bias((self._shown + _HIDDEN).log() + self.last.size.log())

    def _reduce(self, index: int, hidden: Tensor) -> Tensor | None:
        self._attended.append(self._count)
        if index == 0:
            self._processed.append(self._count)
            return None
        theta, tokens, prefix = self.theta[index - 1], self.shape.tokens, self.shape.prefix
        drop_to, merge_to = self._expected(theta[0]), self._expected(theta[1])
        self._count = smallest_count(self._count, drop_to, merge_to)
        self._processed.append(self._count)

        # By attention of the class token, the hidden last: ranks are what the masks are made for.
        row = self._calls[index].rows(torch.zeros(1, dtype=torch.long, device=hidden.device)).mean(1)[:, 0]
        row = row.masked_fill(self._shown.detach() < 0.5, -1.0)
        row[:, :prefix] = float("inf")
        order = row.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        middle, end = min(self._left, int(drop_to)), min(self._left, int(drop_to), int(merge_to))
        if middle < self._left:
            self._shown = self._shown * self._mask(theta[0], middle, self._left)[rank]
        if end < middle:
            hidden = self._merge(hidden, order, middle, end)
            self._shown = self._shown * self._mask(theta[1], end, middle)[rank]
        self._left = end
        return hidden if end < tokens else None

    def _mask(self, theta: Tensor, kept: int, available: int) -> Tensor:
        return rank_mask(theta, self.candidates, self.shape.prefix, self.shape.tokens, kept, available)

    def _merge(self, hidden: Tensor, order: Tensor, middle: int, end: int) -> Tensor:
        """The tokens with ranks from `end` to `middle` added to the mean of those before that are most like them."""
        assert self.last is not None
        kept, merging = order[:, :end], order[:, end:middle]
        with torch.no_grad():
            metric = normalized(hidden)
            similarity = _rows(metric, merging) @ _rows(metric, kept).transpose(1, 2)
            similarity[:, :, : self.shape.prefix] = float("-inf")
            similarity, partner = similarity.max(2)
            partner = kept.gather(1, partner)
            size = self.last.size
            adds = (size.gather(1, merging) * similarity.to(size)).clamp_min(1)
            self.last.size = size.scatter(1, merging, adds).scatter_add(1, partner, adds)
            members = torch.ones_like(size).scatter_add_(1, partner, torch.ones_like(adds))
        index = partner.unsqueeze(2).expand(-1, -1, hidden.shape[2])
        return hidden.scatter_add(1, index, _rows(hidden, merging)) / members.unsqueeze(2).to(hidden.dtype)

    def _finish(self) -> None:
        dense = [self.shape.tokens] * self.shape.layers
        self.macs_share = self.shape.macs(self._attended, self._processed) / self.shape.macs(dense, dense)


def learn_rates(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    flops: float,
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    granularity: int = 4,
    learning_rate: float = 0.01,
    weight: float = 100.0,
    warm_up: int = 0,
) -> Plan:
    """Learn how many tokens each block of an encoder drops and merges. Only the rates train.

    Args:
        model: with an encoder that has a class token; its mode (training or evaluation) and weights stay as they are.
        batches: what to train on, once through, one step a batch; all samples have as many tokens.
        flops: the share of the dense blocks' multiply-accumulates to come to, in (0, 1).
        loss: the loss of a batch; the model's own ``model(**batch).loss`` unless given.
        granularity: tokens between two candidates.
        learning_rate: of AdamW.
        weight: of the squared distance from `flops` in the loss. The paper's 5 per squared GFLOP is 106 for DeiT-S.
        warm_up: steps at the beginning without that term.

    Returns:
        The plan, for `DiffRate`.

    Raises:
        InputError: when the model has no class token, `flops` is out of range, or there is no batch or no loss.
    """
    if not 0 < flops < 1:
        raise InputError(Problem("flops", f"{flops} is no share between 0 and 1.", "Write 0.5 for half."))
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise InputError(Problem("batches", "are empty.", "Give some to train on."))
    loss = _own_loss if loss is None else loss
    learning = RateLearning(find_encoder(model), shape_of(model, first), granularity)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning.theta, lr=learning_rate, weight_decay=0.0)
    with learning, torch.enable_grad():
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for step, batch in enumerate(itertools.chain([first], rest)):
                task = loss(model, batch)
                total = task + (weight if step >= warm_up else 0.0) * (learning.macs_share - flops) ** 2
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return learning.plan_of_rates()


def _own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise InputError(Problem("loss", "is not given by the model.", "Pass labels in the batch, or `loss`."))
    return found


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(2).expand(-1, -1, values.shape[2]))
