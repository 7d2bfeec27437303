"""Class weights, margins and priors: worked numbers and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.classes import (
    effective_number_weights,
    fourth_root_margins,
    inverse_frequency_weights,
    log_prior,
)

COUNTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=6).map(torch.tensor)


def test_worked_numbers():
    counts = torch.tensor([1000, 10])
    found = effective_number_weights(counts, 0.9999)
    assert found.tolist() == pytest.approx([0.0207879, 1.9792121], abs=1e-7)
    assert fourth_root_margins(counts, 0.5).tolist() == pytest.approx([0.158114, 0.5], abs=1e-6)
    assert inverse_frequency_weights(counts).tolist() == pytest.approx([2 / 101, 200 / 101])
    assert inverse_frequency_weights(torch.tensor([4, 1]), 0.5).tolist() == pytest.approx([2 / 3, 4 / 3])
    assert log_prior(torch.tensor([3, 1])).exp().tolist() == pytest.approx([0.75, 0.25])


@given(COUNTS, st.floats(0, 0.999999))
def test_weights_sum_to_the_number_of_classes_and_rarer_ones_count_no_less(counts, beta):
    order = counts.argsort()
    for weights in (effective_number_weights(counts, beta), inverse_frequency_weights(counts)):
        assert weights.sum().item() == pytest.approx(len(counts))
        assert (weights[order].diff() <= 1e-12).all()
    margins = fourth_root_margins(counts, 0.5)
    assert margins.max() == 0.5
    assert (margins[order].diff() <= 0).all()


@given(COUNTS)
def test_beta_of_zero_is_uniform_and_close_to_one_is_inverse_frequency(counts):
    assert torch.equal(effective_number_weights(counts, 0.0), torch.ones(len(counts), dtype=torch.float64))
    close = effective_number_weights(counts.clamp_max(1000), 1 - 1e-12)
    torch.testing.assert_close(close, inverse_frequency_weights(counts.clamp_max(1000)), rtol=1e-6, atol=0)
