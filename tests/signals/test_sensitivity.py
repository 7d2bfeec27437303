"""Sensitivity by differences: the Jacobian in expectation, and its blindness for linear maps."""

import torch
from torch import nn

from tokenwise.signals.sensitivity import sensitivity


def test_it_is_the_size_of_the_jacobian():
    torch.manual_seed(0)
    function = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 8)).double()
    inputs = torch.randn(5, 6, dtype=torch.float64) * 2
    generator = torch.Generator().manual_seed(3)
    moves = torch.stack([torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(400)])
    moves = moves / moves.norm(dim=1, keepdim=True)
    jacobians = [torch.autograd.functional.jacobian(function, row) for row in inputs]
    expected = torch.stack([(moves @ jacobian.T).norm(dim=1).mean() for jacobian in jacobians])
    found = sensitivity(function, inputs, directions=400, step=1e-4, seed=3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_linear_function_tells_no_token_apart():
    torch.manual_seed(0)
    found = sensitivity(nn.Linear(6, 8).double(), torch.randn(5, 6, dtype=torch.float64))
    torch.testing.assert_close(found, found[:1].expand(5))
    assert found[0] > 0


def test_seeds():
    torch.manual_seed(0)
    function, inputs = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4)
    assert torch.equal(sensitivity(function, inputs), sensitivity(function, inputs))
    assert not torch.equal(sensitivity(function, inputs), sensitivity(function, inputs, seed=1))
