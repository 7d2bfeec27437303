"""What the Trainer's logs and the handle say of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import padded, sequences
from test_trainer import METHODS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import tokenwise as tw
from tokenwise.weighting.diagnostics import LOGGED, gradient_by_decile, measure
from tokenwise.weighting.forward import Weighed


class Rising(tw.weighting.TokenWeighter):
    """Weights of 1, 2, 3 ... from step to step."""

    def weights(self, batch, state=None):
        return torch.full(batch.labels.shape, batch.step + 1.0)


def make_trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, **options},
    )
    rows = padded(sequences() + sequences(1), "right")
    return Trainer(copy.deepcopy(model), arguments, train_dataset=rows, eval_dataset=rows)


def by_hand(weights, nll):
    """Every token cut into ten pieces, each of its group's mean size; ten deciles of as many pieces as tokens."""
    size = [abs(w) * (1 - torch.exp(-torch.tensor(n)).item()) if w else 0.0 for w, n in zip(weights, nll, strict=True)]
    means = {w: sum(s for s, v in zip(size, weights, strict=True) if v == w) / weights.count(w) for w in weights}
    pieces = [means[w] / 10 for w in sorted(weights, reverse=True) for _ in range(10)]
    return [sum(pieces[start : start + len(weights)]) for start in range(0, len(pieces), len(weights))]


@settings(deadline=None, max_examples=100)
@given(
    tokens=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, -1.0]) | st.floats(0, 10), st.floats(0, 30)), min_size=1, max_size=25
    )
)
def test_deciles_by_hand(tokens):
    weights, nll = (list(values) for values in zip(*tokens, strict=True))
    found = gradient_by_decile(torch.tensor(weights, dtype=torch.float64), torch.tensor(nll, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(by_hand(weights, nll), dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_deciles_of_known_weights():
    nll = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = gradient_by_decile(torch.ones(40, dtype=torch.float64), nll)
    torch.testing.assert_close(uniform / uniform.sum(), torch.full((10,), 0.1, dtype=torch.float64))
    selected = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(20)
    found = gradient_by_decile(selected, nll.where(selected > 0, torch.nan))
    torch.testing.assert_close(found / found.sum(), torch.tensor([0.2] * 5 + [0.0] * 5, dtype=torch.float64))
    assert gradient_by_decile(torch.empty(0), torch.empty(0)).tolist() == [0.0] * 10
    assert gradient_by_decile(torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])).isnan().any()


def test_the_size_is_half_the_absolute_gradient_at_the_logits():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 4]), reduction="none")
    weights = torch.tensor([3.0, 1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    (weights * nll).sum().backward()
    found = gradient_by_decile(weights, nll.detach())
    torch.testing.assert_close(2 * found.sum(), logits.grad.abs().sum())


def test_logs_speak_of_the_steps_since_the_last_one(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, tmp_path, logging_steps=2)
    handle = tw.weigh(trainer, Rising())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(set(LOGGED) <= set(entry) for entry in logs)
    assert 1 < logs[0]["weights/mean"] < 2
    assert 3 < logs[1]["weights/mean"] < 4
    assert logs[0]["weights/mean"] < handle.stats["mean_weight"] < logs[1]["weights/mean"]
    assert logs[0]["weights/effective_learning_rate"] == pytest.approx(logs[0]["weights/mean"])
    assert logs[0]["weights/effective_sample_size"] < 1
    assert logs[0]["weights/kept_share"] == 1
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    others.append(trainer.evaluate())
    assert not any(key in LOGGED for entry in others for key in entry)
    handle.undo()
    assert "log" not in vars(trainer)
    trainer.train()
    assert not set(LOGGED) & set(trainer.state.log_history[-2])


@pytest.mark.parametrize("name", ["uniform", "dft", "excess_loss step", "focal weight_mean", "focal sequence_mean"])
def test_effective_learning_rate_and_deciles_of_a_step(name, tiny_llama, reference_directory, tmp_path):
    method = METHODS[name](reference_directory)
    trainer = make_trainer(tiny_llama, tmp_path, max_steps=1, gradient_accumulation_steps=4)
    handle = tw.weigh(trainer, method)
    seen = []
    plain = handle.forward.observe
    handle.forward.observe = lambda weighed: (seen.append(weighed), plain(weighed))
    trainer.train()
    weights = torch.cat([weighed.weights for weighed in seen]).double()
    expected = {
        "uniform": 1.0,
        "dft": weights.mean().item(),
        "excess_loss step": 1.0,
        "focal weight_mean": 1.0,
        "focal sequence_mean": None,
    }[name]
    if expected is None:
        assert 0.5 < handle.stats["effective_learning_rate"] < 1
        sequence_means = sum(weighed.gradient_weight.item() for weighed in seen)
        sequence_count = sum(weighed.denominator.item() for weighed in seen)
        assert sequence_count == len(sequences()) - 1  # one has no label
        expected = sequence_means / sequence_count
    assert handle.stats["effective_learning_rate"] == pytest.approx(expected)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["weights/effective_learning_rate"] == handle.stats["effective_learning_rate"]
    assert log["weights/gradient_share_top_decile"] == handle.stats["gradient_share_decile_10"]
    shares = [handle.stats[f"gradient_share_decile_{decile}"] for decile in range(1, 11)]
    assert sum(shares) == pytest.approx(1)
    if name == "uniform":
        assert shares == pytest.approx([0.1] * 10)
    if name == "excess_loss step":
        assert shares[0] == 0 < shares[9]


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        waits = (
            "_local_scalar_dense",
            "nonzero.",
            "unique",
            "_unique",
            "masked_select",
            "repeat_interleave",
            "bincount",
        )
        by_mask = name.startswith("aten.index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += by_mask or name.startswith(tuple(f"aten.{word}" for word in waits))
        return function(*args, **(kwargs or {}))


def test_measuring_waits_for_the_device_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights, nll = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    weights[:10], nll[:10] = 0, torch.nan
    weighed = Weighed(torch.ones(()), torch.tensor(50.0), 50, weights, nll, torch.arange(50), weights.sum(), weights)
    with Waits() as waits:
        measured = measure(weighed)
    assert waits.count == 0
    with Waits() as waits:
        nll[~nll.isnan()].sum().item()
    assert waits.count == 2
    assert measured.dtype == torch.float64
    copies = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or plain(self))
    handle = tw.weighting.Weighing(FakeForward())
    with Waits() as waits:
        handle.observe(weighed)
    assert waits.count + len(copies) == 1
    assert handle.stats["nll"] == pytest.approx(nll[10:].mean().item())
    assert handle.take_interval() == handle.stats
    assert handle.take_interval() == {}


class FakeForward:
    method = state = None
