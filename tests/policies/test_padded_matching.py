"""Merging the best edges beside padding, and plans of methods that drop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.policies.matching import bipartite_edges, largest, merge_best_edges, merge_into_partners
from tokenwise.policies.plans import Shape, counts_after_dropping


def test_dropping_stops_at_one_token_besides_the_protected():
    assert counts_after_dropping(Shape(10, 4, 2), [0, 3, 9, 1]) == [10, 7, 3, 3]
    assert counts_after_dropping(Shape(3, 2, 2), [5, 5]) == [3, 3]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), tokens=st.integers(4, 15), words=st.integers(3, 15), data=st.data())
def test_padding_goes_first_and_words_only_into_words(seed, tokens, words, data):
    words = min(words, tokens)
    metric = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    padding[1, words:] = True
    excluded = padding.clone()
    excluded[:, 0] = True
    removed = data.draw(st.integers(0, (tokens - 1) // 2))
    similarity, partner = bipartite_edges(metric, excluded)
    kept, target = merge_best_edges(similarity, partner, tokens, removed, padding)
    assert kept.shape == (2, tokens - removed)
    assert (kept[:, 0] == 0).all()
    dropped = target < 0
    assert not (dropped & ~padding).any()
    assert dropped[1].sum() == min(removed, tokens - words)
    # Each place is one's own, and who joins it is no padding, nor is it.
    assert torch.equal(target.gather(1, kept), torch.arange(tokens - removed).expand(2, -1))
    joined = [place for place in range(words) if place not in kept[1]]
    assert all(not padding[1, kept[1, target[1, place]]] for place in joined)
    # Without padding the same as the plain way.
    even = largest(similarity[:1], removed)
    plain, into = merge_into_partners(even * 2, partner[:1].gather(1, even), tokens)
    assert torch.equal(plain, kept[:1])
    assert torch.equal(into, target[:1])
