"""Entropy-adaptive fine-tuning against the official loss, worked numbers and autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_steps import check_official_loss

import tokenwise as tw
from tokenwise.signals import head as head_module
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.loss import weighted_linear_cross_entropy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llamafactory_eaft.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"alpha {case['alpha']}")
def test_equals_llama_factory(case):
    check_official_loss(tw.EAFT(alpha=case["alpha"]), GOLDEN, case)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equals_autograd_in_fp64_across_tiles(softcap, monkeypatch):
    monkeypatch.setattr(head_module, "_TILE_BYTES", 1)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((50, 6), (37, 6)))
    labels = torch.randint(37, (50,))
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    entropy = torch.distributions.Categorical(logits=logits.detach().topk(20).values).entropy()
    expected = ((entropy / 3) ** 1.5 * F.cross_entropy(logits, labels, reduction="none")).mean()
    found = weighted_linear_cross_entropy(hidden, weight, labels, weights=tw.EAFT(alpha=1.5), softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_worked_numbers():
    even, sure = torch.zeros(1, 50), torch.full((1, 50), -torch.inf).index_fill(1, torch.tensor([3]), 0.0)
    entropies = torch.cat([head_module.top_entropy(logits.softmax(1)) for logits in (even, sure)])
    assert entropies.tolist() == pytest.approx([math.log(20), 0])
    tokens = TokenBatch(torch.zeros(2), torch.zeros(2), 1, nll=torch.tensor([2.0, 2.0]), top_entropy=entropies)
    assert tw.EAFT().weights(tokens).tolist() == pytest.approx([0.9986, 0], abs=1e-4)
    assert tw.EAFT(alpha=0.0).weights(tokens).tolist() == [1, 1]
    assert tw.EAFT(alpha=2.0).weights(tokens)[0].item() == pytest.approx(0.9971, abs=1e-4)


def test_a_vocabulary_below_twenty_counts_whole():
    logits = torch.randn(4, 7)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(head_module.top_entropy(logits.softmax(1)), expected)


def test_the_weights_of_a_text_follow_the_models_entropy(tiny_llama):
    ids = torch.arange(1, 30)
    found = tw.weighting.token_weights(tiny_llama, tw.EAFT(), ids)
    logits = tiny_llama(ids[None]).logits[0, :-1]
    expected = torch.distributions.Categorical(logits=logits.topk(20).values).entropy() / 3
    torch.testing.assert_close(torch.tensor(found.weights[1:]), expected, atol=1e-5, rtol=0)
