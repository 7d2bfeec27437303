"""The fused weighted loss against the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.signals import head as head_module
from tokenwise.weighting.loss import weighted_linear_cross_entropy


def inputs(tokens=50, hidden=12, vocabulary=37, dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::7] = -100
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weights[::3] = 0
    return draw(tokens, hidden), draw(vocabulary, hidden), draw(vocabulary) if bias else None, labels, weights


def plain(hidden, weight, bias, labels, weights, softcap=None, scale=1.0):
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return (losses * weights).sum() / (labels != -100).sum()


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(head_module, "_TILE_BYTES", 1)  # the floor: 16 rows per tile


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.6]),
    bias=st.booleans(),
    weighted=st.booleans(),
)
def test_equals_the_plain_loss_in_fp64(tokens, softcap, scale, bias, weighted):
    hidden, weight, offset, labels, weights = inputs(tokens=tokens, bias=bias)
    if not weighted:
        weights = torch.ones(tokens, dtype=torch.float64)
    labels[-1] = 5
    expected = plain(hidden, weight, offset, labels, weights, softcap, scale)
    found = weighted_linear_cross_entropy(
        hidden,
        weight,
        labels,
        weights=weights if weighted else None,
        bias=offset,
        softcap=softcap,
        logit_scale=scale,
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, (hidden, weight, offset)), gradients(expected, (hidden, weight, offset)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_narrow_types_stay_close_across_tiles(dtype, tolerance, small_tiles):
    hidden, weight, _, labels, weights = inputs(tokens=200, dtype=dtype)
    expected = plain(hidden, weight, None, labels, weights)
    found = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(found, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_bf16_gradients_are_summed_in_fp32(small_tiles):
    """One token's gradient added a thousand times: a bf16 sum would stall long before the end."""
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    labels = torch.zeros(4096, dtype=torch.int64)
    loss = weighted_linear_cross_entropy(hidden, weight, labels, denominator=1)
    loss.backward()
    assert weight.grad[0].item() == -2048


def test_autocast_decides_the_type_of_the_products():
    hidden, weight, _, labels, _ = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_linear_cross_entropy(hidden, weight, labels)
    rounded = plain(hidden.bfloat16(), weight.bfloat16(), None, labels, torch.ones(50))
    torch.testing.assert_close(loss.double(), rounded, rtol=1e-2, atol=1e-2)
    assert loss.item() != weighted_linear_cross_entropy(hidden, weight, labels).item()
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_a_weight_of_zero_gives_exactly_no_gradient_and_the_row_is_skipped(monkeypatch):
    hidden, weight, _, labels, weights = inputs()
    rows = []
    tile_of_logits = head_module.OutputHead.tile_of_logits
    monkeypatch.setattr(
        head_module.OutputHead,
        "tile_of_logits",
        lambda self, chosen, *rest: rows.append(len(chosen)) or tile_of_logits(self, chosen, *rest),
    )
    weighted_linear_cross_entropy(hidden, weight, labels, weights=weights).backward()
    left_out = (weights == 0) | (labels == -100)
    assert hidden.grad[left_out].abs().max() == 0
    assert hidden.grad[~left_out].abs().sum(1).min() > 0
    assert sum(rows) == (~left_out).sum()


def test_scaling_the_weights_scales_loss_and_gradient():
    hidden, weight, _, labels, weights = inputs()
    one = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights)
    three = weighted_linear_cross_entropy(hidden, weight, labels, weights=3 * weights)
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(gradients(three, [weight])[0], 3 * gradients(one, [weight])[0])


@pytest.mark.parametrize("weights", [None, torch.zeros(50)])
def test_nothing_left_is_a_differentiable_zero(weights):
    hidden, weight, _, labels, _ = inputs(dtype=torch.float32)
    if weights is None:
        labels = torch.full_like(labels, -100)
    loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_only_the_gradients_that_are_wanted_are_made():
    hidden, weight, _, labels, _ = inputs()
    frozen = weight.detach()
    weighted_linear_cross_entropy(hidden, frozen, labels).backward()
    expected = gradients(plain(hidden, frozen, None, labels, 1.0), [hidden])[0]
    torch.testing.assert_close(hidden.grad, expected)
    with torch.no_grad():
        assert not weighted_linear_cross_entropy(hidden, weight, labels).requires_grad


def test_backward_runs_once_and_says_so():
    hidden, weight, _, labels, _ = inputs()
    loss = weighted_linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_leading_dimensions_and_denominator():
    hidden, weight, _, labels, weights = inputs(tokens=48)
    flat = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights, denominator=10)
    folded = weighted_linear_cross_entropy(
        hidden.view(4, 12, -1), weight, labels.view(4, 12), weights=weights.view(4, 12), denominator=10
    )
    assert flat == folded
    torch.testing.assert_close(flat, plain(hidden, weight, None, labels, weights) * (labels != -100).sum() / 10)


@pytest.mark.parametrize("low_memory", [False, True])
def test_low_memory_changes_nothing_but_the_tile(low_memory):
    hidden, weight, _, labels, weights = inputs(dtype=torch.float32)
    loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights, low_memory=low_memory)
    torch.testing.assert_close(loss.double(), plain(hidden, weight, None, labels, weights))
    assert head_module.tile_rows(32768, low_memory) == (384 if low_memory else 1152)


def test_a_pointwise_method_runs_inside_the_tile():
    hidden, weight, _, labels, _ = inputs()
    for method, function in (
        (tw.DFT(), lambda p: -p),
        (tw.PowerAlpha(alpha=0.5), lambda p: (1 - p**0.5) / 0.5),
        (tw.Focal(gamma=2.0), lambda p: -((1 - p) ** 2) * p.log()),
        (tw.Focal(gamma=0.5), lambda p: -((1 - p) ** 0.5) * p.log()),
    ):
        loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=method)
        found = gradients(loss, [hidden, weight])
        kept = labels != -100
        p = torch.softmax(hidden @ weight.t(), 1)[kept, labels[kept]]
        expected = gradients(function(p).mean(), [hidden, weight])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_pointwise_method_may_read_the_entropy():
    class EntropyWeight(tw.weighting.PointwiseWeighter):
        """Weigh by entropy."""

        reads = frozenset({"nll", "entropy"})

        def pointwise(self, batch):
            return batch.entropy * batch.nll, batch.entropy

    hidden, weight, _, labels, _ = inputs()
    logits = hidden @ weight.t()
    entropy = torch.distributions.Categorical(logits=logits).entropy().detach()
    expected = plain(hidden, weight, None, labels, entropy)
    found = weighted_linear_cross_entropy(hidden, weight, labels, weights=EntropyWeight())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, [weight])[0], gradients(expected, [weight])[0])


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, _, labels, weights = inputs()
    with pytest.raises(InputError, match=r"labels: has shape \(49,\)"):
        weighted_linear_cross_entropy(hidden, weight, labels[1:])
    with pytest.raises(InputError, match=r"weights: has shape \(49,\)"):
        weighted_linear_cross_entropy(hidden, weight, labels, weights=weights[1:])
    with pytest.raises(InputError, match="reads reference_nll"):
        weighted_linear_cross_entropy(
            hidden, weight, labels, weights=tw.ReferenceProbabilityPower(reference="somewhere")
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives(dtype):
    hidden, weight, _, labels, weights = inputs(dtype=dtype)
    on_cpu = weighted_linear_cross_entropy(hidden, weight, labels, weights=weights)
    tensors = [tensor.detach().cuda().requires_grad_() for tensor in (hidden, weight)]
    on_gpu = weighted_linear_cross_entropy(*tensors, labels.cuda(), weights=weights.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(gradients(on_gpu, tensors), gradients(on_cpu, [hidden, weight]), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-2, atol=2e-2)


def test_dft_equals_trl():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "trl_dft.json").read_text(encoding="utf-8"))
    hidden, weight = (torch.tensor(golden[name], requires_grad=True) for name in ("hidden", "weight"))
    labels = torch.tensor(golden["labels"])
    loss = weighted_linear_cross_entropy(hidden, weight, labels, weights=tw.DFT())
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-6)
    for ours, name in zip(gradients(loss, [hidden, weight]), ("hidden_gradient", "weight_gradient"), strict=True):
        torch.testing.assert_close(ours, torch.tensor(golden[name]), atol=1e-6, rtol=1e-5)
    found = head_module.token_statistics(hidden, head_module.OutputHead(weight), labels, reads={"entropy"})
    torch.testing.assert_close(found.entropy, torch.tensor(golden["entropy"]), atol=1e-5, rtol=0)


def test_labels_of_vanishing_probability_have_exact_losses():
    """Below the range of fp32 the loss comes from the logits: a difference of 200 is a loss of 200."""
    hidden = torch.tensor([[200.0], [60.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    labels = torch.tensor([1, 1, 1])
    loss = weighted_linear_cross_entropy(hidden, weight, labels, denominator=1)
    expected = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, [hidden, weight]), gradients(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(ours, theirs)
