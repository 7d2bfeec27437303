"""k-means by direction: separated clusters, the fixed point, no empty cluster."""

import torch

from tokenwise.policies.clustering import cluster_directions
from tokenwise.policies.matching import normalized


def test_separated_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(40) % 4
    vectors = torch.eye(4)[truth] * (1 + torch.arange(40).unsqueeze(1)) + 0.01 * torch.randn(40, 4, generator=generator)
    cluster, nearest = cluster_directions(vectors, 4)
    assert torch.equal(cluster.unsqueeze(1) == cluster, truth.unsqueeze(1) == truth)
    assert torch.equal(cluster[nearest], torch.arange(4))


def test_each_token_is_with_its_nearest_centre():
    vectors = torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cluster, nearest = cluster_directions(vectors, 7, seed=3)
    unit = normalized(vectors)
    centres = torch.stack([unit[cluster == one].mean(0) for one in range(7)])
    similarity = unit @ normalized(centres).T
    assert torch.equal(similarity.argmax(1), cluster)
    for one in range(7):
        own = (cluster == one).nonzero()[:, 0]
        assert nearest[one] == own[similarity[own, one].argmax()]
    again, _ = cluster_directions(vectors, 7, seed=3)
    assert torch.equal(again, cluster)


def test_no_cluster_is_empty():
    for vectors in (torch.ones(6, 3), torch.zeros(6, 3), torch.eye(3).repeat(2, 1)):
        for count in range(1, 7):
            cluster, nearest = cluster_directions(vectors, count)
            assert cluster.unique().tolist() == list(range(count))
            assert len(set(nearest.tolist())) == count
