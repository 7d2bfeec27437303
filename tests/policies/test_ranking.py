"""Ranking over many tensors is ranking over their concatenation."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.policies import ranking
from tokenwise.policies.ranking import top_share_across
from tokenwise.policies.selection import top_share

NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)
SMALL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40])


@settings(deadline=None, max_examples=150)
@given(
    tensors=st.lists(st.lists(NUMBERS | SMALL, max_size=9), min_size=1, max_size=4),
    keep=st.floats(0.01, 1.0) | st.sampled_from(["1 token", "3 tokens"]),
    chunk=st.sampled_from([2, 3, 1000]),
)
def test_as_if_side_by_side(tensors, keep, chunk):
    scores = {str(index): torch.tensor(values, dtype=torch.float32) for index, values in enumerate(tensors)}
    before, ranking._CHUNK = ranking._CHUNK, chunk
    try:
        found = top_share_across(scores, keep)
    finally:
        ranking._CHUNK = before
    whole = torch.cat(list(scores.values()))
    assert torch.equal(torch.cat(list(found.values())), top_share(whole, keep))


def test_shapes_and_order():
    scores = {"a": torch.tensor([[0.0, 3.0], [1.0, 1.0]]), "b": torch.tensor(1.0), "c": torch.empty(0, 4)}
    found = top_share_across(scores, 0.6)  # three of five: of the three ones the first two
    assert found["a"].tolist() == [[False, True], [True, True]]
    assert found["b"].tolist() is False
    assert found["c"].shape == (0, 4)
    assert all(mask.dtype == torch.bool for mask in found.values())
    turned = top_share_across({"a": scores["a"].T}, 0.25)
    assert turned["a"].tolist() == [[False, False], [True, False]]


def test_a_million_values_exactly():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(300_000, generator=generator) * (1 + power) for power, name in enumerate("abc")}
    found = top_share_across(scores, 0.123)
    assert sum(int(mask.sum()) for mask in found.values()) == 110_700
    lowest = min(scores[name][mask].min().item() for name, mask in found.items())
    highest = max(scores[name][~mask].max().item() for name, mask in found.items())
    assert lowest > highest
