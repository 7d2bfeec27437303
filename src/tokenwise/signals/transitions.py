"""What matters, read off what a layer does to its tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def transition(before: Tensor, after: Tensor, real: Tensor) -> Tensor:
    """How much a branch of a layer changes each token: the ratio of lengths times the share of the turn.

    Args:
        before: what goes into the branch, [batch, tokens, channels].
        after: what comes out of it, before it is added to the token.
        real: which are tokens, [batch, tokens], bool; the shares of a row are among these.

    Returns:
        [batch, tokens], fp32: ``|after| / |before|`` times the softmax over the row of ``1 - cos(before, after)``; 0
        where either is zero.
    """
    before, after = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (before, after))
    turn = 1 - functional.cosine_similarity(before, after, dim=-1)
    share = turn.masked_fill(~real, float("-inf")).softmax(1)
    length = before.norm(dim=-1)
    made: Tensor = after.norm(dim=-1) / length.where(length > 0, torch.inf) * share
    return made


def neuron_overlap(activation: Tensor, reference: Tensor) -> Tensor:
    """How many neurons of a feed-forward layer are active for a token and for one of reference alike.

    Args:
        activation: of the neurons, [batch, tokens, neurons]; active is what is above 0.
        reference: place of the token of reference, [batch, 1], int64.

    Returns:
        [batch, tokens], int64.
    """
    active = activation > 0
    index = reference.unsqueeze(2).expand(-1, -1, active.shape[2])
    return (active & active.gather(1, index)).sum(2)
