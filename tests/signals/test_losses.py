"""Signals against worked numbers and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.signals.head import OutputHead, row_tiles, token_statistics
from tokenwise.signals.losses import centred_min_max, probability_power, probability_power_slope

HALF_AND_QUARTER = torch.tensor([math.log(2), math.log(4)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("power", "complement", "weights", "losses"),
    [
        (1, 0, [0.5, 0.25], [0.3465736, 0.3465736]),
        (0, 2, [0.25, 0.5625], [0.1732868, 0.7797906]),
        (5, 0.1, [0.0291573, 0.00094887], [0.0202103, 0.00131541]),
        (5, 1, [0.015625, 0.00073242], [0.0108304, 0.00101535]),
        (0, 0, [1, 1], [0.6931472, 1.3862944]),
    ],
)
def test_probability_power_worked_numbers(power, complement, weights, losses):
    found = probability_power(HALF_AND_QUARTER, power, complement)
    torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), atol=5e-8, rtol=0)
    torch.testing.assert_close(found * HALF_AND_QUARTER, torch.tensor(losses, dtype=torch.float64), atol=5e-8, rtol=0)


@given(
    nll=st.floats(1e-6, 30),
    power=st.sampled_from([0.0, 0.5, 1.0, 5.0]),
    complement=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]),
)
def test_probability_power_slope_is_its_derivative(nll, power, complement):
    x = torch.tensor(nll, dtype=torch.float64, requires_grad=True)
    p = torch.exp(-x)
    (p**power * (1 - p) ** complement).backward()
    torch.testing.assert_close(probability_power_slope(x.detach(), power, complement), x.grad, rtol=1e-6, atol=1e-9)


def test_probability_power_is_finite_at_both_ends():
    ends = torch.tensor([0.0, 1e-30, 1e4])
    for power, complement in ((0, 0.1), (0.5, 0.5), (1, 1), (0, 2)):
        assert probability_power(ends, power, complement).isfinite().all()
        assert probability_power_slope(ends, power, complement)[[0, 2]].isfinite().all()


def test_centred_min_max_maps_the_ends_and_survives_equal_values():
    torch.testing.assert_close(centred_min_max(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    for value in torch.rand(200):
        assert (centred_min_max(value.expand(3)) == 0).all()
    assert centred_min_max(torch.tensor([5.0, 5.0 + 1e-6])).abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_token_statistics_equal_the_whole_logits(dtype, monkeypatch):
    monkeypatch.setattr("tokenwise.signals.head._TILE_BYTES", 1)
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(60, 8, dtype=dtype),
        torch.randn(33, 8, dtype=dtype),
        torch.randn(33, dtype=dtype),
    )
    labels = torch.randint(33, (40,))
    rows = torch.randperm(60)[:40]
    head = OutputHead(weight, bias, logit_scale=1.5, softcap=4.0)
    found = token_statistics(hidden, head, labels, rows=rows, reads={"entropy", "top_entropy"})
    distribution = torch.distributions.Categorical(logits=head.logits(hidden[rows]))
    torch.testing.assert_close(found.nll, -distribution.log_prob(labels))
    torch.testing.assert_close(found.entropy, distribution.entropy())
    likeliest = torch.distributions.Categorical(logits=head.logits(hidden[rows]).topk(20).values)
    torch.testing.assert_close(found.top_entropy, likeliest.entropy())
    plain = token_statistics(hidden, head, labels, rows=rows, reads={"top_entropy"})
    torch.testing.assert_close(plain.top_entropy, found.top_entropy)
    assert plain.entropy is None
    assert token_statistics(hidden, head, labels, rows=rows).top_entropy is None


@given(rows=st.integers(0, 1000), size=st.integers(1, 300))
def test_row_tiles_cover_every_row_once(rows, size):
    parts = list(row_tiles(rows, size))
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < part.stop - part.start <= size for part in parts)
