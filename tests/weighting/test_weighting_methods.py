"""Every method's weights against worked numbers."""

from __future__ import annotations

import math

import pytest
import torch

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import Run, TokenBatch


def batch(nll=None, reference=None, entropy=None, sequence=None, step=0, loss_weights=None):
    first = next(values for values in (nll, reference, entropy, loss_weights) if values is not None)
    ids = torch.tensor(sequence or [0] * len(first))
    tensors = [None if values is None else torch.tensor(values) for values in (nll, entropy, reference, loss_weights)]
    return TokenBatch(torch.zeros(len(first), dtype=torch.int64), ids, int(ids.max()) + 1, step, *tensors)


def test_excess_loss_keeps_what_exceeds_the_reference_most():
    method = tw.ExcessLoss(keep=0.5, reference="r")
    found = method.weights(batch(nll=[3.0, 2.0, 1.0, 5.0], reference=[1.0, 1.5, 2.0, 4.9]))
    assert found.tolist() == [1, 1, 0, 0]
    per_sequence = method.replace(scope="sequence")
    found = per_sequence.weights(batch(nll=[3.0, 2.0, 1.0, 5.0], reference=[1.0, 1.5, 2.0, 4.9], sequence=[0, 0, 1, 1]))
    assert found.tolist() == [1, 0, 0, 1]
    assert method.replace(keep=1.0).weights(batch(nll=[1.0, 2.0], reference=[2.0, 1.0])).tolist() == [1, 1]
    hardest = method.weights(batch(nll=[1.0, 4.0, 2.0, 3.0], reference=[1.0] * 4))
    assert hardest.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("strategy", "temperature", "expected"),
    [
        ("lin_upper", 1.0, [0.155362, 0.422319, 0.422319]),
        ("quadratic", 1.0, [0.211942, 0.576117, 0.211942]),
        ("extremes", 1.0, [0.422319, 0.155362, 0.422319]),
        ("lin_upper", 0.4, [0.039424, 0.480288, 0.480288]),
    ],
)
def test_dynamic_loss_worked_numbers(strategy, temperature, expected):
    method = tw.DynamicLoss(strategy=strategy, temperature=temperature)
    one_token_each = method.weights(batch(nll=[1.0, 2.0, 3.0], sequence=[0, 1, 2]))
    torch.testing.assert_close(one_token_each / 3, torch.tensor(expected), atol=1e-6, rtol=0)
    longer = method.weights(batch(nll=[0.5, 1.5, 2.0, 3.0], sequence=[0, 0, 1, 2]))
    torch.testing.assert_close(longer / 3, torch.tensor([expected[0], *expected]), atol=1e-6, rtol=0)


def test_dynamic_loss_is_uniform_where_it_must_be():
    for strategy in ("lin_upper", "quadratic", "extremes"):
        method = tw.DynamicLoss(strategy=strategy)
        assert method.weights(batch(nll=[2.3] * 4, sequence=[0, 1, 2, 3])).tolist() == [1, 1, 1, 1]
        assert method.weights(batch(nll=[2.3, 1.0])).tolist() == [1, 1]
        flat = method.replace(temperature=1e6).weights(batch(nll=[1.0, 2.0], sequence=[0, 1]))
        torch.testing.assert_close(flat, torch.ones(2), atol=1e-5, rtol=0)
        assert method.replace(burn_in=3).weights(batch(nll=[1.0, 2.0], sequence=[0, 1], step=2)).tolist() == [1, 1]
        assert method.replace(burn_in=3).weights(batch(nll=[1.0, 2.0, 3.0], sequence=[0, 1, 2], step=3)).std() > 0


def test_dynamic_loss_weight_ratio_is_bounded_by_the_temperature():
    found = tw.DynamicLoss(temperature=0.5).weights(batch(nll=[0.0, 9.0, 1.0], sequence=[0, 1, 2]))
    assert found.max() / found.min() <= math.exp(1 / 0.5) + 1e-4
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))


def test_prior_weighs_surprise_of_the_reference_to_mean_one():
    method = tw.Prior(reference="r")
    found = method.weights(batch(reference=[-math.log(0.9), -math.log(0.1)]))
    torch.testing.assert_close(found, torch.tensor([0.2, 1.8]))
    constant = method.weights(batch(reference=[0.7, 0.7, 0.7]))
    torch.testing.assert_close(constant, torch.ones(3))
    assert method.weights(batch(reference=[0.0, 0.0])).tolist() == [1, 1]
    assert method.replace(alpha=0).weights(batch(reference=[0.2, 0.9])).tolist() == [1, 1]


def test_the_power_family_agrees_with_its_named_members():
    tokens = batch(nll=[0.1, 1.0, 4.0], reference=[0.3, 2.0, 1.0])
    pairs = [
        (tw.DFT(), tw.ProbabilityPower(power=1, complement_power=0)),
        (tw.PowerAlpha(alpha=0.3), tw.ProbabilityPower(power=0.3, complement_power=0)),
        (tw.Focal(gamma=2, detach=True), tw.ProbabilityPower(power=0, complement_power=2)),
        (tw.Focal(gamma=2), tw.ProbabilityPower(power=0, complement_power=2, detach=False)),
        (tw.Uniform(), tw.ProbabilityPower(power=0, complement_power=0)),
        (tw.Uniform(), tw.Focal(gamma=0)),
        (tw.Uniform(), tw.PowerAlpha(alpha=0)),
        (tw.Uniform(), tw.ReferenceProbabilityPower(power=0, complement_power=0, reference="r")),
    ]
    for one, other in pairs:
        for ours, theirs in zip(one.pointwise(tokens), other.pointwise(tokens), strict=True):
            torch.testing.assert_close(ours, theirs)
    reference = tw.ReferenceProbabilityPower(power=1, complement_power=2, reference="r").weights(tokens)
    p = torch.exp(-tokens.reference_nll)
    torch.testing.assert_close(reference, p * (1 - p) ** 2)


def test_top_entropy_follows_the_quantile():
    method = tw.TopEntropy(keep=0.2)
    assert method.weights(batch(entropy=[0.1, 0.5, 0.2, 0.9, 0.3])).tolist() == [0, 0, 0, 1, 0]
    assert method.replace(keep=1.0).weights(batch(entropy=[0.1, 0.5])).tolist() == [1, 1]


def test_top_entropy_equals_trl():
    # Computed with trl 1.16.0, GRPOTrainer.get_high_entropy_mask, threshold 0.7, on these entropies.
    entropies = [0.61, 1.72, 0.05, 2.31, 0.94, 1.13, 0.47, 1.98, 0.33, 1.51]
    trl = [0, 1, 0, 1, 0, 0, 0, 1, 0, 0]
    assert tw.TopEntropy(keep=0.3).weights(batch(entropy=entropies)).tolist() == trl


def test_loss_weights_are_the_column():
    assert tw.LossWeights().weights(batch(loss_weights=[0.5, 2.0])).tolist() == [0.5, 2.0]


def test_random_keeps_exact_counts_evenly_and_resumes_where_it_stopped():
    method = tw.weighting.Random(keep=0.3)
    state = method.start(Run(seed=5))
    tokens = batch(nll=[0.0] * 10)
    draws = torch.stack([method.weights(tokens, state) for _ in range(2000)])
    assert (draws.sum(1) == 3).all()
    assert (draws.mean(0) - 0.3).abs().max() < 0.05
    saved = state.tensors()
    following = method.weights(tokens, state)
    resumed = method.start(Run(seed=99))
    resumed.load_tensors(saved)
    assert torch.equal(method.weights(tokens, resumed), following)
    assert not torch.equal(
        method.weights(tokens, method.start(Run(seed=5, rank=0))),
        method.weights(tokens, method.start(Run(seed=5, rank=1))),
    )


def test_random_shares_of_a_whole_step_are_drawn_alike_by_all_processes():
    method = tw.weighting.Random(keep=0.3, scope="step")
    tokens = batch(nll=[0.0] * 100)
    one, other = (method.weights(tokens, method.start(Run(seed=5, rank=rank))) for rank in (0, 1))
    # Each process takes its own part of the draw over all tokens: together exactly thirty.
    assert one[:40].sum() + other[40:].sum() == 30
    assert not torch.equal(one, method.weights(tokens, method.start(Run(seed=6))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tw.ExcessLoss(keep=1.6, reference="r"), r"ExcessLoss.keep: 1.6 is not a share"),
        (lambda: tw.ExcessLoss(keep=0.6), "ExcessLoss.reference: is missing"),
        (lambda: tw.ExcessLoss(kep=0.6, reference="r"), "no field 'kep'. Did you mean 'keep'"),
        (lambda: tw.ExcessLoss(reference="r", scope="batch"), "ExcessLoss.scope: 'batch'.*'micro_batch'"),
        (lambda: tw.DynamicLoss(temperature=0), "DynamicLoss.temperature: 0 should be greater than 0"),
        (lambda: tw.DynamicLoss(strategy="linupper"), "DynamicLoss.strategy: 'linupper'"),
        (lambda: tw.TopEntropy(keep=0), "TopEntropy.keep: 0 should be greater than 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
