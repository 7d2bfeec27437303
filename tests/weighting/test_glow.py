"""GLOW: worked numbers, its history, and the same weights whatever the layout of the step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import packed, padded, sequences, train, with_sample_ids
from reference_steps import distance
from safetensors.torch import load_file

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import Run, TokenBatch
from tokenwise.weighting.glow import gain_weights


def samples(losses, first=0):
    """One token per sample."""
    ids = torch.arange(first, first + len(losses))
    return TokenBatch(torch.zeros_like(ids), ids - first, len(ids), nll=torch.tensor(losses), sample_id=ids)


def rows_with_ids(kind="padded", per_row=2):
    pairs = sequences()
    if kind == "padded":
        return with_sample_ids(padded(pairs, "right"))
    ids = [torch.full((len(tokens),), index) for index, (tokens, _) in enumerate(pairs)]
    return [
        {**row, "sample_id": torch.cat(ids[index * per_row : (index + 1) * per_row])}
        for index, row in enumerate(packed(pairs, per_row))
    ]


def test_worked_numbers():
    method, history = tw.GLOW(), tw.GLOW().start(Run())
    assert method.weights(samples([2.0, 2.0, 2.0]), history).tolist() == [1, 1, 1]
    found = method.weights(samples([2.1, 2.0, 1.9]), history)
    assert found.tolist() == pytest.approx([0.880797, 0.5, 0.5], abs=1e-5)
    assert gain_weights(torch.tensor([-0.1, 0, 0.1]), 1.0, 20.0).tolist() == pytest.approx([0.880797, 0.5, 0.119203])
    steep = tw.GLOW(alpha=20.0)
    assert steep.weights(samples([3.0]), history).tolist() == [5.0]
    even = tw.GLOW(alpha=2.0, smallest=0.0, largest=2.0)
    assert even.weights(samples([3.0]), history).tolist() == [1.0]


def test_a_sample_is_compared_with_its_own_last_loss_and_new_ones_weigh_one():
    method, history = tw.GLOW(beta=1.0, smallest=0.0), tw.GLOW().start(Run())
    method.weights(samples([1.0, 4.0]), history)
    found = method.weights(samples([2.0, 7.0], first=1), history)
    assert found.tolist() == pytest.approx([torch.sigmoid(torch.tensor(-2.0)).item(), 1.0])
    assert history.losses == {0: 1.0, 1: 2.0, 2: 7.0}
    # Two parts of one sample have one loss and one weight; the mean is over its tokens.
    parts = TokenBatch(
        torch.zeros(3),
        torch.tensor([0, 1, 1]),
        2,
        nll=torch.tensor([0.0, 3.0, 3.0]),
        sample_id=torch.tensor([1, 1, 1]),
    )
    assert method.weights(parts, history).tolist() == pytest.approx([0.5] * 3)


@given(
    gains=st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    alpha=st.floats(0.1, 5),
    beta=st.floats(0, 30),
)
def test_a_larger_fall_never_weighs_more(gains, alpha, beta):
    method, history = tw.GLOW(alpha=alpha, beta=beta), tw.GLOW().start(Run())
    method.weights(samples([10.0] * len(gains)), history)
    found = method.weights(samples([10.0 - gain for gain in gains]), history)
    assert (found[torch.tensor(gains).argsort(stable=True)].diff() <= 1e-6).all()
    assert 0.5 <= found.min() <= found.max() <= 5


def test_the_history_survives_saving():
    method, history = tw.GLOW(), tw.GLOW().start(Run())
    assert history.tensors()["sample_id"].shape == (0,)
    method.weights(samples([0.1, 2.7]), history)
    copy = method.start(Run())
    copy.load_tensors(history.tensors())
    assert copy.losses == history.losses


def test_the_first_epoch_is_training_on_sequence_means(tiny_llama, tmp_path):
    class SequenceMean(tw.weighting.PointwiseWeighter):
        """Mean per sequence, mean over sequences."""

        reduction = "sequence_mean"

        def pointwise(self, batch):
            return batch.nll, torch.ones_like(batch.nll)

    plain, _, _ = train(tiny_llama, rows_with_ids(), SequenceMean(), tmp_path, 2, 2, steps=2)
    found, _, handle = train(tiny_llama, rows_with_ids(), tw.GLOW(), tmp_path, 2, 2, steps=2)
    assert distance(found, plain) < 1e-6 < distance(found, tiny_llama)
    assert sorted(handle.state.losses) == [0, 1, 2, 4, 5, 6, 7]  # the fourth has no label
    later, _, handle = train(tiny_llama, rows_with_ids(), tw.GLOW(), tmp_path, 2, 2, steps=4)
    assert distance(later, train(tiny_llama, rows_with_ids(), SequenceMean(), tmp_path, 2, 2, steps=4)[0]) > 1e-4
    assert 0.5 < handle.stats["mean_weight"] < 1


def test_three_epochs_are_the_same_whatever_the_layout(tiny_llama, tmp_path):
    model = tiny_llama.double()
    # Batches of four against four batches of one, and against two packed rows of two sequences each.
    expected, losses, handle = train(model, rows_with_ids(), tw.GLOW(), tmp_path, 4, 1, steps=6, clip=0.05)
    for rows, batch, accumulate in ((rows_with_ids(), 1, 4), (rows_with_ids("packed"), 1, 2)):
        found, theirs, other = train(model, rows, tw.GLOW(), tmp_path, batch, accumulate, steps=6, clip=0.05)
        assert distance(found, expected) < 1e-6
        assert theirs == pytest.approx(losses, abs=1e-6)
        assert other.state.losses == pytest.approx(handle.state.losses, abs=1e-6)
        assert other.stats["mean_weight"] == pytest.approx(handle.stats["mean_weight"], abs=1e-6)
    assert handle.stats["mean_weight"] < 0.95


def test_interrupted_and_resumed_equals_uninterrupted(tiny_llama, tmp_path):
    rows, method = rows_with_ids(), tw.GLOW()
    whole, _, _ = train(tiny_llama, rows, method, tmp_path / "whole", 2, 2, steps=5)
    train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=3, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    resumed, _, handle = train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=5, resume=str(checkpoint))
    assert distance(whole, resumed) == 0
    # Without the history the fourth step would have been one of a first epoch.
    state = checkpoint / "tokenwise_state_0.safetensors"
    assert load_file(state)["sample_id"].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert handle.stats["mean_weight"] < 1


def test_refusals(tiny_llama):
    with pytest.raises(InputError, match=r"smallest is 2\.0 and largest 1\.0"):
        tw.GLOW(smallest=2.0, largest=1.0)
    ids = torch.arange(8)[None]
    with pytest.raises(InputError, match="reads the column 'sample_id'"):
        tw.weighted_loss(tiny_llama, {"input_ids": ids, "labels": ids}, tw.GLOW(), state=tw.GLOW().start(Run()))
