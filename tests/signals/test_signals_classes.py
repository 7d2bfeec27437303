"""Dice, focal and contrastive losses: worked numbers, gradients, limits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tokenwise as tw
from tokenwise.signals.classes import dice_loss, focal, label_statistics


@pytest.mark.parametrize(
    ("label", "denominator", "expected"),
    [
        (1, "paper", 0.0763384),
        (1, "square", 0.0172812),
        (0, "paper", 0.4404742),
        (0, "square", 0.3826121),
    ],
)
def test_dice_worked_numbers(label, denominator, expected):
    p, y = torch.tensor([[0.8]], dtype=torch.float64), torch.tensor([[float(label)]], dtype=torch.float64)
    assert dice_loss(p, y, 0.01, 1.0, denominator).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("denominator", ["paper", "square", "batch"])
def test_dice_limits(denominator):
    one = torch.ones(1, 1, dtype=torch.float64)
    assert dice_loss(one, one, 0.0, 1e-4, denominator).item() == 0
    assert torch.isfinite(dice_loss(one, 0 * one, 0.5, 1e-4, denominator)).all()
    falling = dice_loss(torch.linspace(0, 1, 11)[:, None], torch.ones(11, 1), 0.0, 1.0, "paper").squeeze(1)
    assert (falling.diff() < 0).all()


def test_dice_gradient_flows_through_the_damping_and_is_finite_at_certainty():
    p = torch.tensor([[0.3, 0.9], [0.6, 0.2]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for denominator in ("paper", "square", "batch"):
        assert torch.autograd.gradcheck(lambda p, d=denominator: dice_loss(p, y, 0.5, 1.0, d), p)
    certain = torch.ones(1, 1, requires_grad=True)
    dice_loss(certain, torch.ones(1, 1), 0.01, 1.0, "square").sum().backward()
    assert torch.isfinite(certain.grad).all()


def test_focal_worked_numbers_and_gradients():
    assert focal(torch.tensor(2.0).log(), 2.0).item() == pytest.approx(0.1732868, abs=1e-7)
    assert focal(torch.tensor(4.0).log(), 2.0).item() == pytest.approx(0.7797906, abs=1e-7)
    nll = torch.tensor([0.05, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(focal(nll, 0.0), nll)
    assert torch.autograd.gradcheck(lambda nll: focal(nll, 2.0), nll)
    detached = torch.autograd.grad(focal(nll, 2.0, detach=True).sum(), nll)[0]
    torch.testing.assert_close(detached, (1 - torch.exp(-nll.detach())) ** 2)
    certain = torch.zeros(1, requires_grad=True)
    focal(certain, 0.5).sum().backward()
    assert certain.grad.item() == 0


def test_statistics_of_a_label():
    logits = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64).log()
    found = label_statistics(logits, torch.tensor([1, 0]), torch.tensor([0.1, 0.2], dtype=torch.float64))
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(3)
    assert found[0].tolist() == pytest.approx([-math.log(0.2), 0.2, -0.5, entropy, 0.1])
    assert found[1].tolist() == pytest.approx([math.log(3), 1 / 3, 0, 1, 0.2], abs=1e-7)


def embeddings(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_focal_info_nce_is_info_nce_with_weights():
    query, positive, hard = embeddings(3, 5), embeddings(3, 5, seed=1), embeddings(3, 2, 5, seed=2)
    candidates = torch.cat([positive, hard.reshape(6, 5)])
    cosine = F.cosine_similarity(query[:, None], candidates[None], dim=2) / 0.2
    nll = F.cross_entropy(cosine, torch.arange(3), reduction="none")
    plain = tw.focal_info_nce(query, positive, hard, temperature=0.2, gamma=0.0)
    torch.testing.assert_close(plain, nll.mean())
    weighted = tw.focal_info_nce(query, positive, hard, temperature=0.2, gamma=0.5)
    torch.testing.assert_close(weighted, ((1 - torch.exp(-nll)) ** 0.5 * nll).mean())
    # p = 0.64 has the weight 0.6.
    gap = torch.tensor(0.64 / 0.36).log()
    pair = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert tw.focal_info_nce(*pair, temperature=1 / gap.item()).item() == pytest.approx(0.267772, abs=1e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_focal_info_nce_gradients(detach):
    query, positive = embeddings(3, 4).requires_grad_(), embeddings(3, 4, seed=1)
    loss = tw.focal_info_nce(query, positive, temperature=0.5, gamma=0.5, detach=detach)
    found = torch.autograd.grad(loss, query)[0]
    logits = F.normalize(query, dim=1) @ F.normalize(positive, dim=1).T / 0.5
    nll = F.cross_entropy(logits, torch.arange(3), reduction="none")
    weight = (1 - torch.exp(-nll)) ** 0.5
    expected = torch.autograd.grad(((weight.detach() if detach else weight) * nll).mean(), query)[0]
    torch.testing.assert_close(found, expected)


def test_focal_info_nce_refuses_what_does_not_fit():
    query = embeddings(3, 4)
    with pytest.raises(ValueError, match="alike"):
        tw.focal_info_nce(query, query[:2])
    with pytest.raises(ValueError, match="negatives have 5 dimensions"):
        tw.focal_info_nce(query, query, embeddings(2, 5))
    with pytest.raises(ValueError, match="temperature 0 must be above 0"):
        tw.focal_info_nce(query, query, temperature=0)
