"""Losses of whole rows of logits, fused with the output head: made tile by tile, logits never held whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenwise.signals.head import OutputHead, row_tiles, tile_rows
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.head_gradients import HeadGradients, MadeInForward

States = tuple[Tensor, OutputHead]
"""Hidden states [positions, hidden] and the head that reads them."""


@dataclass
class Likeliest:
    """What is known of a reference's distributions: its likeliest tokens.

    Args:
        ids: [tokens, top_k], int64.
        logp: their log-probabilities in nats, [tokens, top_k].
    """

    ids: Tensor
    logp: Tensor

    def complete(self, logits: Tensor, part: slice) -> Tensor:
        """Log-probabilities of some rows over the whole vocabulary, [rows, vocabulary]: the known ones, and what is
        left of the probability spread as the current model spreads it. A divergence from them is that of what is
        known, all other tokens counted as one.

        Args:
            logits: of the current model, [rows, vocabulary]; left as they are.
            part: which rows.
        """
        ids, logp = self.ids[part], self.logp[part].to(logits)
        smallest = torch.finfo(logits.dtype).tiny
        current = logits.log_softmax(1)
        others = 1 - current.gather(1, ids).exp().sum(1, keepdim=True)
        rest = 1 - logp.exp().sum(1, keepdim=True)
        current += rest.clamp_min(smallest).log() - others.clamp_min(smallest).log()
        return current.scatter_(1, ids, logp)


class LogitObjective(ABC):
    """A loss of each token that depends on more of its logits than the label's probability."""

    @abstractmethod
    def tile(self, logits: Tensor, batch: TokenBatch, reference_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """The losses of some rows, and their gradient.

        Args:
            logits: after scale and soft cap, [rows, vocabulary], fp32 or fp64; may be overwritten.
            batch: the tokens of these rows.
            reference_logits: of the reference model, [rows, vocabulary]; None where there is no reference.

        Returns:
            Losses [rows], and the gradient of their sum with respect to `logits` [rows, vocabulary].
        """


def logit_sum(
    hidden: Tensor,
    head: OutputHead,
    rows: Tensor,
    batch: TokenBatch,
    objective: LogitObjective,
    reference: States | Likeliest | None = None,
    *,
    low_memory: bool = False,
) -> Tensor:
    """Sum of a logit objective over the labelled tokens, with its gradients made on the way.

    Args:
        hidden: [positions, hidden].
        head: the output head.
        rows: position of each labelled token, [tokens], int64, rising.
        batch: these tokens.
        objective: the loss.
        reference: hidden states of the reference model at the same positions, and its head; or its likeliest tokens in
            the place of each of `rows`.
        low_memory: use tiles of a third of the size, and no second copy of the weight's gradient.

    Returns:
        A scalar (fp32, or fp64 for fp64 inputs); a differentiable zero where there is no token. `backward` runs once.
    """
    total: Tensor = _LogitSum.apply(
        hidden, head.weight, head.bias, head, rows, batch, objective, reference, low_memory, torch.is_grad_enabled()
    )
    return total


class _LogitSum(MadeInForward):
    """As the weighted sum, but the loss and the gradient of a tile come from the objective."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        rows: Tensor,
        batch: TokenBatch,
        objective: LogitObjective,
        reference: States | Likeliest | None,
        low_memory: bool,
        wants_gradients: bool,
    ) -> Tensor:
        dtype = head.compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        device, count = hidden.device, rows.shape[0]
        factors = weight.detach().to(dtype)
        theirs = reference[1].weight.detach().to(dtype) if isinstance(reference, tuple) else None

        size = min(tile_rows(head.vocabulary, low_memory), count)
        tile = torch.empty(size, head.vocabulary, dtype=wide, device=device)
        reference_tile = torch.empty_like(tile) if isinstance(reference, tuple) else None
        total = torch.zeros((), dtype=wide, device=device)
        wanted = [wants_gradients and needed for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(wanted, hidden, weight, bias, rows, factors=factors, tile=tile, low_memory=low_memory)

        with torch.autocast(device.type, enabled=False):
            for part in row_tiles(count, size):
                chosen = hidden.index_select(0, rows[part]).to(dtype)
                logits = head.tile_of_logits(chosen, factors, tile[: chosen.shape[0]])
                reference_logits = None
                if isinstance(reference, Likeliest):
                    reference_logits = reference.complete(logits, part)
                elif reference is not None:
                    states, reference_head = reference
                    seen = states.index_select(0, rows[part]).to(dtype)
                    assert theirs is not None
                    assert reference_tile is not None
                    reference_logits = reference_head.tile_of_logits(seen, theirs, reference_tile[: seen.shape[0]])
                cap_slope = None
                if head.softcap is not None:
                    cap_slope = (logits / head.softcap).square_().neg_().add_(1)
                values, gradient = objective.tile(logits, batch.part(part), reference_logits)
                total += values.sum()
                # From here on the tile holds d total / d (h @ weight.T + bias).
                if cap_slope is not None:
                    gradient = gradient.mul_(cap_slope)
                if head.logit_scale != 1.0:
                    gradient = gradient.mul_(head.logit_scale)
                gradients.add(part, chosen, gradient)
                # Where the product allocates, two tiles would live at once.
                del logits, reference_logits, gradient

        ctx.gradients = gradients.totals()
        ctx.set_materialize_grads(False)
        return total
