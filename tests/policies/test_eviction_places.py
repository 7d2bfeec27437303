import torch

from tokenwise.policies.budget import kept_count
from tokenwise.policies.eviction import kept_counts, top_places


def test_of_equal_scores_the_first_is_taken():
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0]], [[3.0, 0.0, 3.0, 3.0]]])
    assert top_places(scores, 2).tolist() == [[[1, 2]], [[0, 2]]]
    assert top_places(scores, 3, torch.tensor([3, 1])).tolist() == [[[1, 2, 3]], [[-1, -1, 0]]]


def test_counts_of_rows_are_those_of_one():
    available = torch.arange(1, 200)
    for keep in (0.1, 0.25, 0.5, 0.35, 1.0, "7 tokens"):
        assert kept_counts(keep, available).tolist() == [kept_count(keep, count) for count in available.tolist()]
