"""A budget that the heads of a layer share: exact, between even and the best of all, each head's own best."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.eviction import best_of_all, best_of_shared


def test_by_hand():
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 0, 1, 2], [4.5, 4, 3, 2.5, 2, 1.5, 1, 0.5]]])
    # Of the best six the first head has five; half of the way to three each that is four.
    shown = best_of_shared(scores, torch.tensor([3]), 0.5)
    assert shown[0].int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


@given(st.data())
def test_heads_share_all_of_it_and_keep_their_best(data):
    heads, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 30))
    seeded = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.rand(2, heads, tokens, generator=seeded)
    scores = scores.masked_fill(torch.rand(2, heads, tokens, generator=seeded) < 0.2, float("-inf"))
    counts, floor = torch.tensor([data.draw(st.integers(1, tokens)) for _ in range(2)]), data.draw(st.floats(0, 1))
    shown, there = best_of_shared(scores, counts, floor), scores > float("-inf")
    found, available = shown.sum(2), there.sum(2)
    assert torch.equal(found.sum(1), (counts * heads).minimum(available.sum(1)))
    assert not bool((shown & ~there).any())
    # What goes is no better than what stays beside it.
    worst = scores.masked_fill(~shown, float("inf")).amin(2)
    gone = scores.masked_fill(shown, float("-inf")).amax(2)
    assert bool((gone <= worst).all())
    assert bool((found >= (floor * counts - 1e-6).floor().long().unsqueeze(1).minimum(available)).all())
    best = best_of_all([scores], counts * heads, torch.ones_like(counts))[0].sum(2)
    if bool((available >= counts.unsqueeze(1)).all()):
        mixed = (1 - floor) * best.double() + floor * counts.unsqueeze(1)
        assert float((found - mixed).abs().max()) < 1 + 1e-6
