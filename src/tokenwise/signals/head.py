"""From hidden states to token statistics through the output head, one tile of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenwise.signals.products import multiply

IGNORED = -100
"""The label of a position that has none."""

STATISTICS = frozenset({"nll", "entropy", "top_entropy"})
"""What can be read off the logits of a token; see `TokenStatistics`."""

_TOP = 20

_TILE_BYTES = 144 * 2**20
_LOW_MEMORY_TILE_BYTES = 48 * 2**20


@dataclass(frozen=True)
class OutputHead:
    """The linear map from hidden states to logits: ``softcap * tanh(scale * (h @ weight.T + bias) / softcap)``.

    Args:
        weight: [vocabulary, hidden].
        bias: [vocabulary], or None.
        logit_scale: a constant factor on the logits.
        softcap: the bound of the logits, or None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The whole logits of `hidden` [..., hidden], for small inputs: [..., vocabulary]."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The type the matrix products run in: autocast's, or that of the hidden states."""
        kind = hidden.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype

    def tile_of_logits(self, hidden: Tensor, weight: Tensor, tile: Tensor) -> Tensor:
        """The logits of `hidden` [rows, hidden], in `tile` [rows, vocabulary] (fp32 or fp64) where that is fastest.

        `hidden` and `weight` are in the compute dtype already, so that the conversion happens once per call.
        """
        logits = multiply(hidden, weight, tile.dtype, out=tile)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def tile_rows(vocabulary: int, low_memory: bool = False) -> int:
    """Rows per tile: 144 MiB of fp32 logits (48 MiB in low-memory mode), at least 16 rows."""
    return max(16, (_LOW_MEMORY_TILE_BYTES if low_memory else _TILE_BYTES) // (4 * vocabulary))


def row_tiles(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows, of equal length as far as possible."""
    tiles = -(-rows // size) if rows else 0
    bounds = [rows * index // tiles for index in range(tiles + 1)] if tiles else []
    return (slice(start, stop) for start, stop in itertools.pairwise(bounds))


@dataclass
class TokenStatistics:
    """Statistics of labelled tokens, each [tokens] unless said, fp32 (fp64 for fp64 models) unless said, detached.

    Args:
        nll: negative log-likelihood of the label in nats, at least 0.
        entropy: entropy of the distribution over the vocabulary in nats, in [0, ln vocabulary]; None unless wanted.
        top_entropy: entropy of the distribution over the 20 likeliest tokens alone in nats, in [0, ln 20]; None unless
            wanted.
        rank: how many tokens of the vocabulary are more likely than the label, int32; None unless wanted.
        is_top1: whether the label is the most likely token (of equally likely ones the first), bool; None unless
            wanted.
        top_ids: the most likely tokens, most likely first, [tokens, top_k], int32; None unless wanted.
        top_logp: their log-probabilities in nats, [tokens, top_k]; None unless wanted.
    """

    nll: Tensor
    entropy: Tensor | None = None
    top_entropy: Tensor | None = None
    rank: Tensor | None = None
    is_top1: Tensor | None = None
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None


def top_entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of the 20 likeliest outcomes (all of them where there are fewer), scaled to sum to 1.

    Args:
        probabilities: [tokens, vocabulary], at least 0, or any positive multiple of them.

    Returns:
        [tokens], in [0, ln 20].
    """
    largest = probabilities.topk(min(_TOP, probabilities.shape[1]), dim=1, sorted=False).values
    parts: Tensor = torch.special.entr(largest / largest.sum(1, keepdim=True))
    return parts.sum(1)


@torch.no_grad()
def token_statistics(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    reads: Collection[str] = (),
    top_k: int = 0,
    low_memory: bool = False,
) -> TokenStatistics:
    """Negative log-likelihood and, where wanted, other statistics of each row, without ever holding all logits.

    Args:
        hidden: [positions, hidden].
        head: the output head.
        labels: label of each row, [rows], int64, none ignored.
        rows: the positions to score, [rows], int64; all of them unless given.
        reads: the names of the statistics wanted beside the nll (``entropy`` needs a second tile); others are ignored.
        top_k: how many of the most likely tokens to find too, at most the vocabulary.
        low_memory: use tiles of a third of the size.
    """
    count = labels.shape[0]
    dtype = head.compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    weight = head.weight.to(dtype)
    nll = torch.empty(count, dtype=wide, device=hidden.device)
    entropies = torch.empty_like(nll) if "entropy" in reads else None
    top_entropies = torch.empty_like(nll) if "top_entropy" in reads else None
    ranks = torch.empty(count, dtype=torch.int32, device=hidden.device) if "rank" in reads else None
    tops = torch.empty(count, dtype=torch.bool, device=hidden.device) if "is_top1" in reads else None
    top_ids = torch.empty(count, top_k, dtype=torch.int32, device=hidden.device) if top_k else None
    top_logp = torch.empty(count, top_k, dtype=wide, device=hidden.device) if top_k else None
    size = min(tile_rows(head.vocabulary, low_memory), count)
    tile = torch.empty(size, head.vocabulary, dtype=wide, device=hidden.device)
    spare = torch.empty_like(tile) if entropies is not None else None
    with torch.autocast(hidden.device.type, enabled=False):
        for part in row_tiles(count, size):
            chosen = hidden[part] if rows is None else hidden.index_select(0, rows[part])
            logits = head.tile_of_logits(chosen.to(dtype), weight, tile[: chosen.shape[0]])
            of_label = logits.gather(1, labels[part].unsqueeze(1)).squeeze(1)
            largest = logits.amax(1)
            if ranks is not None:
                ranks[part] = (logits > of_label.unsqueeze(1)).sum(1, dtype=torch.int32)
            if top_ids is not None and top_logp is not None:
                top_logp[part], top_ids[part] = logits.topk(top_k, dim=1)
            if tops is not None:
                tops[part] = logits.argmax(1) == labels[part]
            if spare is None:
                exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
            else:
                exponentials = torch.sub(logits, largest.unsqueeze(1), out=spare[: chosen.shape[0]]).exp_()
            total = exponentials.sum(1)
            normalizer = largest + total.log()
            nll[part] = (normalizer - of_label).clamp_min_(0)
            if top_logp is not None:
                top_logp[part] -= normalizer.unsqueeze(1)
            if entropies is not None:
                mean_logit = torch.bmm(exponentials.unsqueeze(1), logits.unsqueeze(2)).view(-1) / total
                entropies[part] = (normalizer - mean_logit).clamp_min_(0)
            if top_entropies is not None:
                top_entropies[part] = top_entropy(exponentials)
            # Where the product allocates, two tiles would live at once.
            del logits, exponentials
    return TokenStatistics(nll, entropies, top_entropies, ranks, tops, top_ids, top_logp)
