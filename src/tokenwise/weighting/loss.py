"""The one weighted loss: fused with the output head, gradients made in the forward pass, logits never held whole."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.signals.head import (
    IGNORED,
    STATISTICS,
    OutputHead,
    row_tiles,
    tile_rows,
    token_statistics,
    top_entropy,
)
from tokenwise.weighting.base import PointwiseWeighter, TokenBatch
from tokenwise.weighting.head_gradients import HeadGradients, MadeInForward

Pointwise = Callable[[TokenBatch], tuple[Tensor, Tensor]]

Metrics = Literal["none", "trained", "all"]

_SMALLEST_PROBABILITY = 1e-30
"""Below it a probability may have lost digits to the range of fp32, and its logarithm is taken from the logits."""


def weighted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | PointwiseWeighter | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: Tensor | float | None = None,
    low_memory: bool = False,
) -> Tensor:
    """Cross-entropy of a linear head with a weight per token: ``sum(w * nll) / denominator``.

    Index t of `labels` and `weights` speaks of the prediction made from `hidden[t]`: shift before the call. Rows
    with label -100 or weight 0 are left out before the matrix product. The gradients of `hidden`, `weight` and `bias`
    are made in the forward pass, tile by tile (three matrix products, none recomputed), so `backward` can run once.

    Args:
        hidden: [..., hidden], any float type; products run in it (or in autocast's type), sums in fp32.
        weight: [vocabulary, hidden].
        labels: [...], int64, -100 where there is none.
        weights: [...], finite, no gradient is taken through them; or a pointwise method, evaluated inside the tile;
            None weighs every token 1.
        bias: [vocabulary], or None.
        softcap: bound of the logits as in Gemma 2, or None.
        logit_scale: factor on the logits as in Cohere.
        denominator: what the weighted sum is divided by; the number of labels unless given.
        low_memory: use tiles of a third of the size, and no second copy of the weight's gradient.

    Returns:
        A scalar (fp32, or fp64 for fp64 inputs); a differentiable zero where no label is left.

    Raises:
        InputError: when the shapes do not fit.
    """
    if labels.shape != hidden.shape[:-1]:
        raise InputError(
            Problem("labels", f"has shape {tuple(labels.shape)}, hidden states have {tuple(hidden.shape[:-1])}.")
        )
    if isinstance(weights, Tensor) and weights.shape != labels.shape:
        raise InputError(
            Problem("weights", f"has shape {tuple(weights.shape)}, labels have {tuple(labels.shape)}.", "Align them.")
        )
    flat = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    rows = targets.ne(IGNORED).nonzero().squeeze(1)
    head = OutputHead(weight, bias, logit_scale, softcap)
    batch = TokenBatch(labels=targets[rows], sequence=torch.zeros_like(rows), sequences=1)
    given: Tensor | Pointwise | None = None
    if isinstance(weights, Tensor):
        given = weights.reshape(-1)[rows]
    elif weights is not None:
        if weights.reads - STATISTICS:
            unread = ", ".join(sorted(weights.reads - STATISTICS))
            raise InputError(
                Problem(
                    "weights",
                    f"{type(weights).__name__} reads {unread}, which is not here.",
                    "Use weighted_loss, or give the weights as a tensor.",
                )
            )
        given = weights.pointwise
    reads = weights.reads if isinstance(weights, PointwiseWeighter) else ()
    total = weighted_sum(flat, head, rows, batch, given, reads=reads, low_memory=low_memory).total
    return total / (max(rows.shape[0], 1) if denominator is None else denominator)


@dataclass
class WeightedSum:
    """What `weighted_sum` gives.

    Args:
        total: sum of the weighted losses, a scalar with gradient.
        weights: weight of each token, [tokens], detached: the factor of its gradient.
        nll: negative log-likelihood of each token in nats, [tokens], detached; NaN where it was never computed
            because the weight is zero.
        values: what each token adds to `total`, [tokens], detached.
        entropy: entropy of each token's distribution in nats, [tokens], detached; None unless `metrics` are wanted.
        is_top1: whether the label is the most likely token, [tokens], bool; None unless `metrics` are wanted.
    """

    total: Tensor
    weights: Tensor
    nll: Tensor
    values: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None


def weighted_sum(
    hidden: Tensor,
    head: OutputHead,
    rows: Tensor,
    batch: TokenBatch,
    weights: Tensor | Pointwise | None,
    *,
    reads: Collection[str] = (),
    metrics: Metrics = "none",
    low_memory: bool = False,
) -> WeightedSum:
    """Sum of weighted token losses through the head, with its gradients made on the way.

    Args:
        hidden: [positions, hidden].
        head: the output head.
        rows: position of each labelled token, [tokens], int64, rising.
        batch: these tokens; its tensors are sliced along with the tiles for a pointwise function.
        weights: [tokens], or a function from a TokenBatch with `nll` to (loss, d loss / d nll), or None for 1.
        reads: which `STATISTICS` the pointwise function reads; other names are ignored.
        metrics: of which tokens to give the entropy and whether the label is the most likely token. Tokens of weight
            zero are left out of the products; ``all`` costs them one product of the three, ``trained`` gives them an
            entropy of 0 and False.
        low_memory: use tiles of a third of the size, and no second copy of the weight's gradient.
    """
    kept = None
    zero = None
    if isinstance(weights, Tensor):
        weights = weights.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        zero = weights == 0
        if zero.any():
            kept = (~zero).nonzero().squeeze(1)
    used = batch if kept is None else TokenBatch(batch.labels[kept], batch.sequence[kept], batch.sequences)
    used_rows = rows if kept is None else rows[kept]
    used_weights = weights[kept] if kept is not None and isinstance(weights, Tensor) else weights
    total, nll, slopes, values, *statistics = _WeightedSum.apply(
        hidden,
        head.weight,
        head.bias,
        head,
        used_rows,
        used,
        used_weights,
        reads if callable(used_weights) else (),
        metrics != "none",
        low_memory,
        torch.is_grad_enabled(),
    )
    if kept is not None:
        assert isinstance(weights, Tensor)
        assert zero is not None
        nll = torch.full_like(weights, torch.nan, dtype=nll.dtype).index_copy_(0, kept, nll)
        values = torch.zeros_like(weights, dtype=values.dtype).index_copy_(0, kept, values)
        slopes = weights
        if metrics == "trained":
            entropies, tops = statistics
            statistics = [torch.zeros_like(nll).index_copy_(0, kept, entropies), (~zero).index_copy_(0, kept, tops)]
        elif metrics == "all":
            rest = zero.nonzero().squeeze(1)
            found = token_statistics(
                hidden.detach(),
                head,
                batch.labels[rest],
                rows=rows[rest],
                reads={"entropy", "is_top1"},
                low_memory=low_memory,
            )
            assert found.entropy is not None
            assert found.is_top1 is not None
            nll.index_copy_(0, rest, found.nll)
            entropies, tops = statistics
            statistics = [
                torch.empty_like(nll).index_copy_(0, kept, entropies).index_copy_(0, rest, found.entropy),
                torch.empty_like(zero).index_copy_(0, kept, tops).index_copy_(0, rest, found.is_top1),
            ]
    return WeightedSum(total, slopes, nll, values, *(statistics if metrics != "none" else ()))


class _WeightedSum(MadeInForward):
    """Forward makes the loss and its gradients; backward multiplies them by the incoming scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        rows: Tensor,
        batch: TokenBatch,
        weights: Tensor | Pointwise | None,
        reads: Collection[str],
        metrics: bool,
        low_memory: bool,
        wants_gradients: bool,
    ) -> tuple[Tensor, ...]:
        count, vocabulary = rows.shape[0], head.vocabulary
        dtype = head.compute_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        factors = weight.detach().to(dtype)
        device = hidden.device

        # Positions without a gap need no gather.
        dense = count == hidden.shape[0]

        nll = torch.empty(count, dtype=wide, device=device)
        slopes = torch.empty_like(nll)
        values = torch.empty_like(nll)
        entropies = torch.empty_like(nll) if metrics or "entropy" in reads else None
        tops = torch.empty(count, dtype=torch.bool, device=device) if metrics else None
        total = torch.zeros((), dtype=wide, device=device)
        size = min(tile_rows(vocabulary, low_memory), count)
        tile = torch.empty(size, vocabulary, dtype=wide, device=device)
        spare = torch.empty_like(tile) if entropies is not None or head.softcap is not None else None
        wanted = [wants_gradients and needed for needed in ctx.needs_input_grad[:3]]
        gradients = HeadGradients(wanted, hidden, weight, bias, rows, factors=factors, tile=tile, low_memory=low_memory)

        with torch.autocast(device.type, enabled=False):
            for part in row_tiles(count, size):
                chosen = (hidden[part] if dense else hidden.index_select(0, rows[part])).to(dtype)
                labels = batch.labels[part].unsqueeze(1)
                logits = head.tile_of_logits(chosen, factors, tile[: chosen.shape[0]])
                if spare is None:
                    probabilities = torch.softmax(logits, 1, out=logits)
                else:
                    probabilities = torch.softmax(logits, 1, out=spare[: chosen.shape[0]])
                of_label = probabilities.gather(1, labels).squeeze(1)
                losses = of_label.log().neg_().clamp_min_(0)
                lost = of_label < _SMALLEST_PROBABILITY
                if lost.any():
                    losses[lost] = _losses_of(head, chosen[lost], factors, labels[lost], wide)
                nll[part] = losses
                if entropies is not None:
                    mean_logit = torch.bmm(probabilities.unsqueeze(1), logits.unsqueeze(2)).view(-1)
                    normalizer = logits.gather(1, labels).squeeze(1) + losses
                    entropies[part] = (normalizer - mean_logit).clamp_min_(0)
                if tops is not None:
                    tops[part] = logits.argmax(1) == labels.squeeze(1)
                if callable(weights):
                    seen = batch.part(part)
                    seen.nll = losses
                    if "top_entropy" in reads:
                        seen.top_entropy = top_entropy(probabilities)
                    if entropies is not None and "entropy" in reads:
                        seen.entropy = entropies[part]
                    value, slope = weights(seen)
                elif weights is None:
                    value, slope = losses, torch.ones_like(losses)
                else:
                    slope = weights[part]
                    value = slope * losses
                total += value.sum()
                values[part] = value
                slopes[part] = slope
                if not gradients.wanted:
                    continue

                # From here on the tile holds d total / d (h @ weight.T + bias).
                gradient = probabilities
                gradient.scatter_add_(1, labels, gradient.new_full((1, 1), -1.0).expand_as(labels))
                if head.softcap is not None:
                    gradient.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
                scale = slope if head.logit_scale == 1.0 else slope * head.logit_scale
                if weights is not None or head.logit_scale != 1.0:
                    gradient.mul_(scale.unsqueeze(1))
                gradients.add(part, chosen, gradient)
                # Where the product allocates, two tiles would live at once.
                del logits, probabilities, gradient

        ctx.gradients = gradients.totals()
        statistics = (
            nll,
            slopes,
            values,
            *(() if entropies is None else (entropies,)),
            *(() if tops is None else (tops,)),
        )
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return (total, *statistics)


def _losses_of(head: OutputHead, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    tile = torch.empty(hidden.shape[0], head.vocabulary, dtype=dtype, device=hidden.device)
    logits = head.tile_of_logits(hidden, weight, tile)
    return logits.logsumexp(1) - logits.gather(1, labels).squeeze(1)
