"""Distributionally robust weights: closed form, limits, and the loss they are the gradient of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch


def tokens(losses, lengths=None):
    """Sequences of the given mean losses, each token at its sequence's mean."""
    sequence = torch.arange(len(losses)).repeat_interleave(torch.tensor(lengths or [1] * len(losses)))
    nll = torch.tensor(losses, dtype=torch.float64)[sequence]
    return TokenBatch(torch.zeros(len(sequence)), sequence, len(losses), nll=nll)


def test_worked_numbers():
    found = tw.KLDRO(temperature=2.0).weights(tokens([1.0, 2.0, 3.0], [2, 1, 3]))
    parts = [math.exp(loss / 2) for loss in (1, 2, 3)]
    expected = [3 * part / sum(parts) for part in parts]
    assert found.tolist() == pytest.approx([expected[0]] * 2 + [expected[1]] + [expected[2]] * 3)


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(0, 20), min_size=1, max_size=8),
    temperature=st.floats(0.05, 50),
)
def test_weights_average_to_one_and_follow_the_loss(losses, temperature):
    found = tw.KLDRO(temperature=temperature).weights(tokens(losses))
    assert found.mean().item() == pytest.approx(1)
    order = torch.tensor(losses, dtype=torch.float64).argsort()
    assert (found[order].diff() >= 0).all()


def test_limits():
    losses = [0.5, 2.0, 1.0]
    assert tw.KLDRO(temperature=1e9).weights(tokens(losses)).tolist() == pytest.approx([1, 1, 1])
    assert tw.KLDRO(temperature=1e-3).weights(tokens(losses)).tolist() == pytest.approx([0, 3, 0])
    assert tw.KLDRO().weights(tokens([4.0])).tolist() == [1]
    with pytest.raises(InputError, match=r"KLDRO.temperature: 0 should be greater than 0"):
        tw.KLDRO(temperature=0)


def test_the_gradient_is_that_of_the_log_mean_exp_loss(tiny_llama):
    """Detached weights and the robust loss itself train alike, so one of them is enough."""
    model = tiny_llama.double()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 64, (4, 9), generator=generator)
    labels = ids.clone()
    labels[1, 6:] = -100
    labels[3, :5] = -100
    temperature = 0.7
    tw.weighted_loss(model, {"input_ids": ids, "labels": labels}, tw.KLDRO(temperature=temperature)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    losses = torch.nn.functional.cross_entropy(
        model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    means = losses.sum(1) / (labels[:, 1:] != -100).sum(1)
    robust = temperature * (torch.logsumexp(means / temperature, 0) - math.log(4))
    robust.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6)
