"""Allocators: whole numbers that meet a rate, hand-computed."""

import math

import pytest

from tokenwise.policies.allocators import (
    at_most_half,
    counts_by_weight,
    counts_on_shifted_cosine,
    entropy_weights,
    linear_weights,
)
from tokenwise.policies.plans import Shape


def test_weights_spread_a_rate():
    shape = Shape(101, 4, 1)
    assert counts_by_weight(shape, 10, [1, 1, 1, 1]) == [91, 81, 71, 61]
    assert counts_by_weight(shape, 10, [3, 0, 0, 1]) == [71, 71, 71, 61]
    assert counts_by_weight(shape, 2.5, [1, 1, 1, 1]) == [98, 96, 93, 91]  # rounding does not add up
    assert counts_by_weight(shape, 60, [1, 1, 1, 1]) == [41, 2, 2, 2]
    assert linear_weights(5, -1) == [2, 1.5, 1, 0.5, 0]
    assert linear_weights(1, 0.5) == [0.5]


def test_at_most_half_passes_the_rest_on():
    assert at_most_half(Shape(101, 4, 1), [20, 20, 20, 20]) == [51, 26, 20, 20]
    assert at_most_half(Shape(101, 2, 1), [90, 80]) == [90, 80]


def test_the_papers_shifted_cosine():
    counts = counts_on_shifted_cosine(Shape(1001, 32), 0.0)
    shares = [count / 1001 for count in counts]
    assert counts[:8] == [1001] * 8
    assert shares[8] == pytest.approx(0.844, abs=1e-3)
    assert shares[16] == pytest.approx(0.475, abs=1e-3)
    assert shares[24:] == pytest.approx([0.15] * 8, abs=1e-3)
    assert sum(shares) / 32 == pytest.approx(0.5375, abs=1e-3)


def test_concentrated_attention_weighs_more():
    assert entropy_weights([0.0, math.log(16) / 2, math.log(16)], 16) == pytest.approx([1, 0.75, 0])
    assert entropy_weights([math.log(16)] * 2, 16) == [1, 1]
