"""Which tokens are one cluster: k-means by direction."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenwise.policies.matching import normalized


@torch.no_grad()
def cluster_directions(vectors: Tensor, count: int, seed: int = 0, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """k-means on vectors of length 1, by cosine, begun as k-means++ begins.

    Args:
        vectors: [tokens, channels].
        count: of clusters, at most as many as there are tokens.
        seed: of the first centres.
        iterations: at most; it ends earlier where no token changes its cluster.

    Returns:
        The cluster of each token, [tokens], int64, none empty; and of each cluster the token nearest to its centre,
        [count], int64; of equally near ones the first.
    """
    unit = normalized(vectors)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(unit), (1,), generator=generator).to(unit.device)
    distance = 2 - 2 * unit @ unit[first[0]]
    chosen = [first]
    while len(chosen) < count:
        # The floor makes room for tokens that are equal; one that was chosen is not chosen again.
        weights = (distance.clamp_min(0) + 1e-6).index_fill(0, torch.cat(chosen), 0)
        chosen.append(torch.multinomial(weights.cpu(), 1, generator=generator).to(unit.device))
        distance = torch.minimum(distance, 2 - 2 * unit @ unit[chosen[-1][0]])
    centre = unit[torch.cat(chosen)]
    cluster = torch.full((len(unit),), -1, device=unit.device)
    for _ in range(iterations):
        similarity = unit @ normalized(centre).T
        found = _fill(similarity.argmax(dim=1), similarity)
        if torch.equal(found, cluster):
            break
        cluster = found
        centre = torch.zeros_like(centre).index_add(0, cluster, unit)
    similarity = unit @ normalized(centre).T
    member = cluster.unsqueeze(1) == torch.arange(count, device=unit.device)
    return cluster, similarity.masked_fill(~member, -torch.inf).argmax(dim=0)


def _fill(cluster: Tensor, similarity: Tensor) -> Tensor:
    """Clusters of which none is empty: an empty one gets the token that fits worst where it is and is not alone."""
    cluster = cluster.clone()
    sizes = cluster.bincount(minlength=similarity.shape[1])
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        own = similarity.gather(1, cluster.unsqueeze(1))[:, 0]
        moved = own.masked_fill(sizes[cluster] == 1, torch.inf).argmin()
        sizes[cluster[moved]] -= 1
        sizes[empty] = 1
        cluster[moved] = empty
    return cluster
