import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenwise.policies.budget import kept_count
from tokenwise.policies.eviction import best_of_all, kept_counts, top_places


def test_of_equal_scores_the_first_is_taken():
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0]], [[3.0, 0.0, 3.0, 3.0]]])
    assert top_places(scores, 2).tolist() == [[[1, 2]], [[0, 2]]]
    assert top_places(scores, 3, torch.tensor([3, 1])).tolist() == [[[1, 2, 3]], [[-1, -1, 0]]]


def test_counts_of_rows_are_those_of_one():
    available = torch.arange(1, 200)
    for keep in (0.1, 0.25, 0.5, 0.35, 1.0, "7 tokens"):
        assert kept_counts(keep, available).tolist() == [kept_count(keep, count) for count in available.tolist()]


def test_the_best_of_all_may_lie_on_several_devices():
    with FakeTensorMode():
        scores = [torch.zeros(2, 3, 8, device=device) for device in ("cuda:1", "cpu", "cuda:0")]
        shown = best_of_all(scores, *(torch.ones(2, dtype=torch.long, device="cuda:1") for _ in range(2)))
    assert [part.device for part in shown] == [score.device for score in scores]


def test_of_equal_scores_the_first_are_taken():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 3, 200, generator=generator)
    few = torch.randint(0, 4, (2, 3, 200), generator=generator).float()
    hidden = plain.masked_fill(plain < 1, float("-inf"))
    for scores in (plain, few, torch.zeros(2, 3, 200), hidden, -hidden):
        for most in (1, 7, 60, 200):
            expected = scores.argsort(dim=2, descending=True, stable=True)[:, :, :most].sort(dim=2).values
            assert torch.equal(top_places(scores, most), expected)
            assert torch.equal(top_places(scores, most, torch.tensor([most, most])), expected)
