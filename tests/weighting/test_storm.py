"""STORM: the meta-gradient against finite differences, weights of mean 1, wrong labels end with less weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenwise.weighting.base import Run
from tokenwise.weighting.classification import ClassBatch
from tokenwise.weighting.storm import Storm


def drawn(count, seed=0, wrong=0.0):
    """Two classes apart in six dimensions, a share of the labels wrong: (features, labels, which are wrong)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 2, (count,), generator=generator)
    features = torch.randn(count, 6, generator=generator) + 1.5 * (2 * truth[:, None] - 1)
    flipped = torch.rand(count, generator=generator) < wrong
    return features, torch.where(flipped, 1 - truth, truth), flipped


@pytest.mark.parametrize("bias", [False, True])
def test_looking_ahead_is_a_step_and_has_the_gradient_of_finite_differences(bias):
    method = Storm(look_ahead=0.7)
    generator = torch.Generator().manual_seed(0)
    features, labels, _ = drawn(8)
    earlier, earlier_labels, _ = drawn(5, seed=1)
    head = {"weight": torch.randn(2, 6, generator=generator, dtype=torch.float64)}
    if bias:
        head["bias"] = torch.randn(2, generator=generator, dtype=torch.float64)
    weights = torch.rand(8, generator=generator, dtype=torch.float64).requires_grad_()

    def after(weights):
        ahead = method.look_one_step_ahead(features.double(), labels, weights, head)
        return F.cross_entropy(F.linear(earlier.double(), **ahead), earlier_labels)

    assert torch.autograd.gradcheck(after, weights)
    stepped = {name: tensor.clone().requires_grad_() for name, tensor in head.items()}
    nll = F.cross_entropy(F.linear(features.double(), **stepped), labels, reduction="none")
    (weights.detach() * nll).mean().backward()
    for name, tensor in method.look_one_step_ahead(features.double(), labels, weights, head).items():
        torch.testing.assert_close(tensor, stepped[name].detach() - 0.7 * stepped[name].grad)


def test_wrong_labels_end_with_less_weight():
    method = Storm(learning_rate=0.01)
    state = method.start(Run(seed=0))
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for step in range(200):
        features, labels, flipped = drawn(32, seed=step, wrong=0.25)
        batch = ClassBatch(head(features), labels, features=features, weight=head.weight, bias=head.bias)
        losses = method.losses(batch, state)
        nll = batch.nll().detach()
        # Where the model is certain its loss rounds to zero, and says nothing of the weight.
        weights = torch.where(nll > 0, losses.detach() / nll, 1.0)
        assert (nll == 0).any() or weights.mean().item() == pytest.approx(1, abs=1e-4)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert weights[flipped].mean() < 0.5 * weights[~flipped].mean()


def test_state_goes_round():
    method = Storm()
    one, other = method.start(Run(seed=0)), method.start(Run(seed=5))
    features, labels, _ = drawn(6)
    weight = torch.ones(2, 6)

    def losses(state):
        return method.losses(ClassBatch(features @ weight.T, labels, features=features, weight=weight), state)

    for _ in range(3):
        losses(one)
    other.load_tensors({name: tensor.clone() for name, tensor in one.tensors().items()})
    assert torch.equal(losses(one), losses(other))
    assert torch.equal(losses(one), losses(other))


def test_a_process_without_labels_keeps_none_waiting(tmp_path):
    script = Path(__file__).with_name("two_processes_storm.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    subprocess.run([*map(str, command), str(tmp_path)], check=True, timeout=120, capture_output=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    fresh = torch.cat([p.detach().flatten() for p in Storm().start(Run(seed=0)).rescaler.parameters()])
    assert not torch.equal(first, fresh)
