"""Learnable counts: the official implementation's numbers and gradients."""

import json
from pathlib import Path

import pytest
import torch

from tokenwise.policies.rates import expected_count, rank_mask, rate_candidates, smallest_count

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/diffrate.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["rates"], ids=lambda case: str(case["patches"]))
def test_counts_masks_and_gradients_are_the_official_ones(case):
    candidates = rate_candidates(case["patches"], case["granularity"])
    theta = torch.zeros(len(candidates)) + torch.tensor(case["theta"])
    theta.requires_grad_()
    kept = expected_count(theta, candidates, 1)
    assert int(kept) == case["kept"]
    (gradient,) = torch.autograd.grad(kept, theta)
    assert torch.allclose(gradient[:16], torch.tensor(case["kept_gradient"]), atol=1e-5)
    tokens = case["patches"] + 1
    mask = rank_mask(theta, candidates, 1, tokens, int(kept), case["available"])
    if case["mask"] is not None:
        assert torch.allclose(mask, torch.tensor(case["mask"]), atol=1e-6)
    (gradient,) = torch.autograd.grad((mask * torch.arange(tokens) ** 0.5).sum(), theta)
    assert torch.allclose(gradient[:16], torch.tensor(case["mask_gradient"]), atol=1e-4)


def test_at_the_beginning_half_of_the_patches_stay():
    candidates = rate_candidates(196, 1)
    assert int(expected_count(torch.zeros(196), candidates, 1)) == 100


def test_the_smallest_count_passes_its_gradient_to_every_rate():
    counts = [torch.tensor(value, requires_grad=True) for value in (9.0, 7.0, 5.0)]
    smallest = smallest_count(*counts)
    smallest.backward()
    assert smallest.item() == 5
    assert counts[0].grad is None
    assert counts[1].grad == counts[2].grad == 1
