"""Counts that can be learned: a softmax over candidates, and masks through which its gradient flows."""

from __future__ import annotations

import torch
from torch import Tensor


def rate_candidates(patches: int, granularity: int) -> Tensor:
    """How many patches may stay: ``patches``, ``patches - granularity`` and so on, at least 1; [candidates], int64."""
    return torch.arange(patches, 0, -granularity)


def expected_count(theta: Tensor, candidates: Tensor, prefix: int) -> Tensor:
    """The expected number of tokens that stay, rounded up; the gradient is the expectation's.

    Args:
        theta: logits of the candidates, [candidates].
        candidates: patches that stay, [candidates].
        prefix: tokens that stay beside them.
    """
    mean = theta.softmax(0) @ candidates.to(theta.dtype)
    return _rounded(mean) + prefix


def _rounded(mean: Tensor) -> Tensor:
    # A rounding error of the softmax's sum must not cost a token.
    return (mean - 1e-4).ceil().detach() + mean - mean.detach()


def survival(theta: Tensor, candidates: Tensor, prefix: int, tokens: int) -> Tensor:
    """The probability that the token at each rank stays: the sum over candidates that reach it, [tokens]."""
    ranks = torch.arange(tokens, device=theta.device)
    reached = candidates.unsqueeze(1) + prefix > ranks
    return theta.softmax(0) @ reached.to(theta.dtype)


def rank_mask(theta: Tensor, candidates: Tensor, prefix: int, tokens: int, kept: int, available: int) -> Tensor:
    """What the mask of the tokens, sorted by rank, is multiplied with: 0 for ranks from `kept` to `available`.

    Ranks from `available` on were hidden before; a 1 there lets their earlier gradient pass.

    Args:
        theta, candidates, prefix: as for `expected_count`.
        tokens: how many there are, the hidden ones included.
        kept: how many stay.
        available: how many were left.

    Returns:
        [tokens], 0 or 1, with the gradient of `survival`.
    """
    probability = survival(theta, candidates, prefix, tokens)
    ranks = torch.arange(tokens, device=theta.device)
    hard = ((ranks < kept) | (ranks >= available)).to(theta.dtype)
    return hard + probability - probability.detach()


def smallest_count(*counts: Tensor) -> Tensor:
    """The smallest of the counts; each of them but the first gets the whole gradient."""
    value = torch.stack([count.detach() for count in counts]).min()
    through = sum((count - count.detach() for count in counts[1:]), start=torch.zeros_like(value))
    return value + through
