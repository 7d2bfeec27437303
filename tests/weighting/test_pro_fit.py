"""ProFit against the official loss and worked numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference_steps import check_official_loss

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.loss import weighted_linear_cross_entropy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "profit.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"threshold {case['threshold']}")
def test_equals_the_official_loss(case):
    hidden, weight, labels = check_official_loss(tw.ProFit(threshold=case["threshold"]), GOLDEN, case)
    probabilities = torch.softmax(hidden @ weight.t(), -1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    left_out = (labels == -100) | (probabilities < case["threshold"])
    assert hidden.grad[left_out].abs().max() == 0
    assert hidden.grad[~left_out].abs().sum(1).min() > 0


def test_worked_numbers():
    tokens = TokenBatch(torch.zeros(4), torch.zeros(4), 1, nll=-torch.tensor([0.9, 0.3, 0.1, 0.01]).log())
    assert tw.ProFit(threshold=0.2).weights(tokens).tolist() == [1, 1, 0, 0]
    assert tw.ProFit(threshold=0.0).weights(tokens).tolist() == [1, 1, 1, 1]
    assert tw.ProFit().threshold == 0.1
    with pytest.raises(InputError, match=r"ProFit.threshold: 1.5 should be less than or equal to 1"):
        tw.ProFit(threshold=1.5)


def test_a_threshold_of_zero_is_plain_cross_entropy_even_where_probabilities_vanish():
    hidden, weight = torch.tensor([[200.0], [1.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    labels = torch.tensor([1, 1])
    loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=tw.ProFit(threshold=0.0))
    torch.testing.assert_close(loss, weighted_linear_cross_entropy(hidden, weight, labels))
