"""Clusters around density peaks: tokens with many close neighbours and no denser one nearby."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(values: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Clusters of vectors; ties go to the smaller index.

    Args:
        values: [tokens, channels].
        count: how many clusters, at most `tokens`.
        neighbours: how many nearest vectors, itself included, a density is the mean over.

    Returns:
        centres: the vectors in the middle, [count], int64, the highest peak first.
        cluster: the place among `centres` of each vector's, [tokens], int64.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / values.shape[1] ** 0.5
    near = distance.topk(min(neighbours, len(values)), largest=False).values
    density = (-(near**2).mean(1)).exp()
    index = torch.arange(len(values), device=values.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (index < index[:, None]))
    height = distance.where(denser, distance.max()).min(1).values * density
    centres = height.argsort(descending=True, stable=True)[:count]
    cluster = distance[centres].argmin(0)
    cluster[centres] = torch.arange(count, device=values.device)
    return centres, cluster
