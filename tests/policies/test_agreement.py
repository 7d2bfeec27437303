"""Agreement of choices and rankings against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.agreement import jaccard, kendall_tau


def test_jaccard_counts_what_is_common():
    assert jaccard(torch.tensor([1, 4, 7]), torch.tensor([7, 2, 1, 9])) == 2 / 5
    assert jaccard(torch.tensor([3, 1]), torch.tensor([1, 3])) == 1
    assert jaccard(torch.tensor([0]), torch.tensor([5])) == 0
    empty = torch.tensor([], dtype=torch.long)
    assert jaccard(empty, empty) == 1


def test_tau_of_a_worked_example():
    # 6 pairs: 5 ordered alike, 1 otherwise.
    assert kendall_tau(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(4 / 6)
    assert kendall_tau(torch.tensor([1.0, 2, 3]), torch.tensor([9.0, 5, 1])) == -1
    assert math.isnan(kendall_tau(torch.ones(3), torch.tensor([1.0, 2, 3])))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_tau_is_the_definition_with_ties(pairs):
    first, second = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float32) for side in (0, 1))
    alike = otherwise = tied_first = tied_second = 0
    for i in range(len(pairs)):
        for j in range(i):
            a, b = pairs[i][0] - pairs[j][0], pairs[i][1] - pairs[j][1]
            alike += a * b > 0
            otherwise += a * b < 0
            tied_first += a == 0
            tied_second += b == 0
    total = len(pairs) * (len(pairs) - 1) // 2
    scale = math.sqrt((total - tied_first) * (total - tied_second))
    found = kendall_tau(first, second)
    if scale == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx((alike - otherwise) / scale)


def test_tau_is_the_same_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2500, generator=generator)  # more pairs than are made at once
    second = first + second
    a, b = (torch.triu((x[:, None] - x).sign(), 1) for x in (first, second))
    assert kendall_tau(first, second) == pytest.approx(float((a * b).sum()) / (2500 * 2499 / 2))
