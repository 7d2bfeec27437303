"""Budgets, selection and normalisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.budget import kept_count, parse_keep
from tokenwise.policies.selection import top_quantile, top_share
from tokenwise.policies.weights import group_mean, mean_one, softmax_weights


@pytest.mark.parametrize(("given", "kept"), [(0.5, 0.5), (1, 1.0), ("0.25", 0.25), ("128 tokens", "128 tokens")])
def test_keep_accepts_shares_and_amounts(given, kept):
    assert parse_keep(given) == kept
    assert type(parse_keep(given)) is type(kept)


@pytest.mark.parametrize(
    "wrong", [0, 0.0, -0.5, 1.5, 2, 128, True, "many", "0 tokens", "5_ tokens", "2 GiB", None, float("nan")]
)
def test_keep_refuses_what_is_no_share_and_says_how_to_write_it(wrong):
    with pytest.raises(ValueError, match=r"share|amount"):
        parse_keep(wrong)


@given(keep=st.floats(0.001, 1), available=st.integers(0, 5000))
def test_kept_count_is_within_half_a_unit_of_the_share(keep, available):
    count = kept_count(keep, available)
    assert 0 <= count <= available
    assert abs(count - keep * available) <= 0.5 + 1e-9 or count == 1
    assert kept_count(1.0, available) == available
    assert kept_count("3 tokens", available) == min(3, available)


@given(
    scores=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60),
    keep=st.floats(0.05, 1),
    groups=st.integers(1, 4),
)
def test_top_share_keeps_exact_counts_of_the_largest_in_each_group(scores, keep, groups):
    values = torch.tensor(scores)
    group = torch.arange(len(scores)) % groups
    mask = top_share(values, keep, group)
    for index in range(groups):
        inside = group == index
        if not inside.any():
            continue
        kept, dropped = values[inside & mask], values[inside & ~mask]
        assert len(kept) == kept_count(keep, int(inside.sum()))
        assert not len(dropped) or kept.min() >= dropped.max()


def test_ties_go_to_the_smaller_index():
    assert top_share(torch.zeros(5), 0.4).tolist() == [True, True, False, False, False]
    assert top_share(torch.tensor([1.0, 2, 2, 2]), "2 tokens").tolist() == [False, True, True, False]
    alternating = torch.tensor([0, 1, 0, 1])
    assert top_share(torch.zeros(4), 0.5, alternating).tolist() == [True, True, False, False]


@given(count=st.integers(1, 200), keep=st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9, 1.0]))
def test_top_quantile_is_the_quantile_rule(count, keep):
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(count)).double()
    threshold = torch.quantile(scores, 1 - keep)
    expected = scores >= threshold - 1e-9
    assert torch.equal(top_quantile(scores, keep), expected)


def test_empty_input_gives_empty_masks():
    empty = torch.empty(0)
    assert top_share(empty, 0.5).shape == (0,)
    assert top_quantile(empty, 0.5).shape == (0,)
    assert mean_one(empty).shape == (0,)


def test_mean_one_per_group_and_uniform_where_all_is_zero():
    weights = torch.tensor([0.1, 0.9, 0.0, 0.0, 5.0])
    groups = torch.tensor([0, 0, 1, 1, 2])
    found = mean_one(weights, groups, 3)
    torch.testing.assert_close(found, torch.tensor([0.2, 1.8, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(group_mean(found, groups, 3), torch.ones(3))
    torch.testing.assert_close(mean_one(weights).mean(), torch.tensor(1.0))


def test_softmax_weights_average_to_one_and_flatten_with_temperature():
    values = torch.tensor([0.0, 1.0, 1.0])
    torch.testing.assert_close(softmax_weights(values, 1.0) / 3, torch.tensor([0.155362, 0.422319, 0.422319]))
    torch.testing.assert_close(softmax_weights(values, 1e6), torch.ones(3), atol=1e-5, rtol=0)
