"""How alike the attention of different queries is, with a gradient: a loss for training."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenwise.signals.attention import attention_softmax


def attention_similarity(attention: Tensor, threshold: float = 2.0) -> Tensor:
    """The mean cosine between each query's attention and the mean over all queries; low where queries differ.

    After the attention diversification loss of "Robustifying Token Attention for Vision Transformers" (arXiv
    2303.11126). It needs the whole map, and so belongs in the training of small models.

    Args:
        attention: [batch, heads, queries, keys], each row summing to 1.
        threshold: entries at or below ``threshold / keys`` count as 0, in the rows and in their mean.

    Returns:
        A scalar in [0, 1] with a gradient.
    """
    rows = attention.mean(1)
    mean = rows.mean(1, keepdim=True)
    bound = threshold / rows.shape[2]
    rows, mean = rows * (rows > bound), mean * (mean > bound)
    return torch.cosine_similarity(mean, rows, dim=2).mean()


def attention_map(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """All of the attention, with its gradient.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, key heads, keys, head_dim]; heads is a multiple of key heads.
        bias: what is added to the scores, or None.
        scaling: factor on the scores.
        softcap: bound of the scores, or None.
        sinks: a further score of each head that takes its share of every row, [heads], or None.

    Returns:
        [batch, heads, queries, keys], fp32 (fp64 for fp64). Each row sums to 1, with sinks to less.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.to(dtype) @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    return attention_softmax(scores, None if sinks is None else sinks.view(-1, 1, 1))
