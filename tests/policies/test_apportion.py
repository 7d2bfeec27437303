"""Budgets shared out: whole, in proportion, within capacities."""

from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.apportion import apportion


def test_examples():
    assert apportion(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]
    assert apportion(10, [6, 3, 1], [4, 10, 10]) == [4, 5, 1]
    assert apportion(5, [0, 0, 0], [1, 9, 9]) == [1, 2, 2]
    assert apportion(5, [1, 0], [3, 9]) == [3, 2]
    assert apportion(9, [1, 2], [2, 2]) == [2, 2]
    assert apportion(3, [5, 5, 5, 5], [1, 0, 1, 1]) == [1, 0, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8), st.integers(0, 100))
def test_the_whole_is_given_within_capacities(parts, count):
    weights, capacity = [list(each) for each in zip(*parts, strict=True)]
    shares = apportion(count, weights, capacity)
    assert sum(shares) == min(count, sum(capacity))
    assert all(0 <= share <= most for share, most in zip(shares, capacity, strict=True))
    total = sum(weights)
    if total and all(most >= count for most in capacity):
        assert all(abs(share - count * one / total) < 1 for share, one in zip(shares, weights, strict=True))
