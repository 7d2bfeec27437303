import copy
import functools
import math

import numpy as np
import pytest
import torch
from small_jobs import ACCUMULATE, BATCH, LABELS_OF_A_STEP, LENGTH, make_job, make_task
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenwise.comparison import held_out as held_out_module
from tokenwise.comparison import language_modeling, training
from tokenwise.comparison.data import Windows
from tokenwise.comparison.held_out import HeldOut, held_out_loss
from tokenwise.comparison.language_modeling import Blocks, run
from tokenwise.comparison.training import EndlessRows, RunFailed
from tokenwise.models.load import load_tokenizer, make_or_load_model
from tokenwise.weighting.apply import weigh


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def train(task, tmp_path):
    """Run a job; returns its result, its progress events and the folder."""

    def train(*arguments, **options):
        events = []
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return run(make_job(task, *arguments, **options), folder, events.append), events, folder

    return train


def model_and_windows(task):
    model = make_or_load_model(task["model"], 0, load_tokenizer(task["tokenizer"]))
    return model, Windows.load(task["held_out_windows"])


def test_a_run_learns_and_reports_everything_it_is_asked_for(train):
    result, events, folder = train(steps=20, evaluations=4)
    assert result.status == "finished"
    assert result.quality.nats_per_token < math.log(250)
    assert result.costs.steps == 20
    assert result.costs.tokens_seen == result.costs.tokens_trained == 20 * LABELS_OF_A_STEP
    assert result.costs.flops > 0
    assert result.costs.wall_seconds > 0
    assert [point.share for point in result.curve] == [0.25, 0.5, 0.75, 1.0]
    assert result.curve[-1].held_out < result.curve[0].held_out
    assert result.curve[-1].flops == result.costs.flops
    one = ("mean_weight", "effective_sample_size", "kept_share", "effective_learning_rate")
    tenths = {f"gradient_share_decile_{place}": 0.1 for place in range(1, 11)}
    assert result.weights == pytest.approx(dict.fromkeys(one, 1.0) | tenths)
    assert events[-1]["share"] == 1.0
    assert math.isfinite(events[-1]["loss"])
    tokens, weights = result.example["tokens"], result.example["weights"]
    assert len(tokens) == len(weights) > 10
    assert weights[0] is None
    assert set(weights[1:]) == {1.0}

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.use_cache
    assert len(AutoTokenizer.from_pretrained(folder / "model")) == model.config.vocab_size
    windows = Windows.load(result.job.task["held_out_windows"])
    assert held_out_loss(model, windows).nats_per_token == pytest.approx(result.quality.nats_per_token, rel=1e-5)


@pytest.mark.parametrize(
    ("unit", "amount", "steps"),
    [
        ("tokens_seen", 3 * LABELS_OF_A_STEP + 1, 4),
        ("tokens_trained", 2 * LABELS_OF_A_STEP, 4),
    ],
)
def test_a_run_stops_at_the_first_step_at_which_the_budget_is_spent(train, unit, amount, steps):
    method = {"random": {"keep": 0.5}} if unit == "tokens_trained" else "uniform"
    result, _, _ = train(method, unit=unit, steps=amount)
    assert result.costs.steps == steps
    assert getattr(result.costs, unit) >= amount
    assert getattr(result.costs, unit) - getattr(result.costs, unit) / steps < amount


def test_a_budget_of_operations_follows_what_one_step_costs(train):
    costs = train(unit="flops", steps=1e8)[0].costs
    assert costs.flops >= 1e8 > costs.flops - costs.flops / costs.steps


def test_operations_of_a_step_agree_with_the_closed_form_and_leave_the_model_alone(task, tmp_path):
    model, _ = model_and_windows(task)
    before = copy.deepcopy(model.state_dict())
    rows = EndlessRows(Blocks(np.load(task["train_blocks"])), 1)
    collate = functools.partial(training.pad_rows, padding=0, mask=False)
    trainer = training.make_trainer(model, rows, collate, task["training"], 1, tmp_path, 1)
    method = training.build_method(make_job(task))
    flops = training.count_flops(trainer, method, weigh) * BATCH * ACCUMULATE * LENGTH

    tokens, hidden, vocabulary = BATCH * ACCUMULATE * LENGTH, 32, model.config.vocab_size
    body = 2 * tokens * 2 * (4 * hidden * hidden + 3 * hidden * 64) * 3
    head = 2 * LABELS_OF_A_STEP * hidden * vocabulary * 3
    attention = 2 * 2 * tokens * LENGTH * hidden * 2 * 3.5
    assert flops == pytest.approx(body + head + attention, rel=0.02)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_methods_of_a_seed_start_alike_and_see_the_same_data_in_the_same_order(task, train, monkeypatch):
    seen, first = [], []
    pad = training.pad_rows

    def watch(rows, **options):
        seen.append(torch.stack([row["input_ids"] for row in rows]))
        return pad(rows, **options)

    make = language_modeling.make_or_load_model

    def make_and_watch(*arguments):
        model = make(*arguments)
        first.append(copy.deepcopy(model.state_dict()))
        return model

    monkeypatch.setattr(language_modeling, "pad_rows", watch)
    monkeypatch.setattr(language_modeling, "make_or_load_model", make_and_watch)

    def order(*arguments, **options):
        seen.clear()
        train(*arguments, steps=6, **options)
        return torch.cat(seen[: 7 * ACCUMULATE])

    uniform, random, other = order(seed=1), order({"random": {"keep": 0.5}}, seed=1), order(seed=2)
    assert torch.equal(uniform, random)
    assert not torch.equal(uniform, other)
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
    assert not torch.equal(first[0]["lm_head.weight"], first[2]["lm_head.weight"])


def test_every_pass_over_the_data_sees_every_block_once_in_another_order(task):
    blocks = np.load(task["train_blocks"])
    endless = EndlessRows(Blocks(blocks), seed=3)
    passes = [[tuple(endless[p * len(blocks) + i]["input_ids"].tolist()) for i in range(len(blocks))] for p in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(tuple(block) for block in blocks.tolist())
    assert passes[0] != passes[1]


def test_a_loss_that_turns_nan_ends_the_run_at_once(train):
    with pytest.raises(RunFailed, match="training loss became nan at step 3"):
        train("own.py:Diverging", steps=10)


def test_evaluation_is_unweighted_and_does_not_count(train):
    few = train(steps=4, evaluations=1)[0]
    many = train(steps=4, evaluations=4)[0]
    assert few.quality == many.quality
    assert (few.costs.flops, few.costs.tokens_seen) == (many.costs.flops, many.costs.tokens_seen)
    assert len(many.curve) == 4


def test_bf16_trains_close_to_fp32(train):
    half, full = (train(steps=2, precision=precision)[0].quality.nats_per_token for precision in ("bf16", "fp32"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_held_out_loss_equals_the_plain_loss_of_each_document(task, monkeypatch):
    model, windows = model_and_windows(task)
    model.train()
    quality = held_out_loss(model, windows)
    assert model.training
    expected = np.zeros(len(windows.text_bytes))
    for row, length in enumerate(windows.lengths):
        ids = torch.tensor(windows.input_ids[row : row + 1, :length]).long()
        logits = model(input_ids=ids).logits[0, :-1]
        expected[windows.document[row]] += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert quality.nll == pytest.approx(expected.tolist(), rel=1e-5)
    assert sum(quality.tokens) == (windows.labels != -100).sum()
    assert quality.bytes == windows.text_bytes.tolist()

    monkeypatch.setattr(held_out_module, "_LOGITS_AT_ONCE", 1)  # one window at a time
    assert held_out_loss(model, windows).nll == pytest.approx(quality.nll, rel=1e-5)


def test_evaluations_on_the_way_use_the_same_first_windows(task, monkeypatch):
    model, windows = model_and_windows(task)
    monkeypatch.setattr(held_out_module, "CURVE_TOKENS", 100)
    held_out = HeldOut(windows, "fp32")
    assert held_out.on_the_way(model) == pytest.approx(held_out.start_of(held_out.losses(model)), rel=1e-6)
    assert 100 <= held_out._labels[: held_out._start].sum() < 100 + LENGTH
