"""Greedy choices by distance: official numbers, definitions step by step, zero and equal vectors."""

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.policies.diversity import cosine_distance, farthest_first, largest_sum

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "input_reduction.json").read_text(encoding="utf-8"))


def test_toy():
    vectors = torch.tensor([[1, 0], [1, 0.1], [0, 1], [-1, 0]])
    assert farthest_first(cosine_distance(vectors), 3).tolist() == [3, 0, 2]


def test_the_official_choice_in_its_order():
    vectors = torch.sin(torch.arange(1, 64 * 8 + 1, dtype=torch.float64) ** 2 * 0.731).reshape(64, 8).float()
    chosen = GOLDEN["div_prune"]["chosen"]
    assert farthest_first(cosine_distance(vectors), len(chosen)).tolist() == chosen


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(0, 1000), st.data())
def test_each_choice_is_the_best_left(tokens, seed, data):
    count = data.draw(st.integers(1, tokens))
    generator = torch.Generator().manual_seed(seed)
    distance = cosine_distance(torch.randn(tokens, 4, generator=generator, dtype=torch.float64))
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    start = torch.tensor(seed % tokens)
    for found, worth in (
        (farthest_first(distance, count, start), lambda rows: rows.min(0).values),
        (farthest_first(distance, count, start, weights), lambda rows: rows.min(0).values * weights),
        (largest_sum(distance, count, start), lambda rows: rows.sum(0)),
    ):
        assert found[0] == start
        assert len(set(found.tolist())) == count
        for step in range(1, count):
            left = worth(distance[found[:step]]).index_fill(0, found[:step], -torch.inf)
            assert left[found[step]] >= left.max() - 1e-12


def test_any_rising_function_of_the_distance_chooses_the_same():
    # The chord is a metric, for which the greedy choice is at most twice as bad as the best one; 1 - cos is none.
    distance = cosine_distance(torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal(farthest_first(distance, 20), farthest_first((2 * distance).clamp_min(0).sqrt(), 20))


def test_zero_and_equal_vectors():
    vectors = torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 0], [0, 0]])
    distance = cosine_distance(vectors)
    assert not distance.isnan().any()
    assert sorted(farthest_first(distance, 5).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(farthest_first(torch.zeros(6, 6), 4).tolist()) == [0, 1, 2, 3]
    assert sorted(largest_sum(torch.zeros(3, 3), 3, torch.tensor(1)).tolist()) == [0, 1, 2]
    assert farthest_first(cosine_distance(torch.ones(1, 3)), 1).tolist() == [0]
