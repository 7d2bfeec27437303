"""weigh on transformers' Trainer: the same update whatever the batch layout, checkpoints, undo, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from layouts import packed, padded, sequences, train, with_sample_ids
from reference_steps import TOLERANCE, distance, step, weighted_step
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.reference import ReferenceModel


class FocalWeightMean(tw.weighting.PointwiseWeighter):
    """Focal weights, divided by their own sum."""

    reduction = "weight_mean"

    def pointwise(self, batch):
        weight = 1 - torch.exp(-batch.nll)
        return weight * batch.nll, weight


class FocalSequenceMean(FocalWeightMean):
    """Focal weights, mean per sequence, mean over sequences."""

    reduction = "sequence_mean"


METHODS = {
    "uniform": lambda reference: tw.Uniform(),
    "dft": lambda reference: tw.DFT(),
    "focal": lambda reference: tw.Focal(),
    "excess_loss sequence": lambda reference: tw.ExcessLoss(keep=0.6, reference=reference, scope="sequence"),
    "excess_loss step": lambda reference: tw.ExcessLoss(keep=0.6, reference=reference, scope="step"),
    "dynamic_loss step": lambda reference: tw.DynamicLoss(scope="step"),
    "eaft": lambda reference: tw.EAFT(),
    "kldro step": lambda reference: tw.KLDRO(scope="step"),
    "top_entropy step": lambda reference: tw.TopEntropy(keep=0.4, scope="step"),
    "prior": lambda reference: tw.Prior(reference=reference),
    "focal weight_mean": lambda reference: FocalWeightMean(),
    "focal sequence_mean": lambda reference: FocalSequenceMean(),
}
LAYOUTS = {
    "one batch": (8, 1, "right"),
    "accumulate 2": (4, 2, "right"),
    "accumulate 4": (2, 4, "right"),
    "an empty micro-batch": (1, 8, "right"),
    "left padding": (4, 2, "left"),
    "packed": (1, 4, "packed"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_layout_gives_the_update_of_the_fp64_reference(name, tiny_llama, reference_directory, tmp_path):
    model = tiny_llama.double()
    method = METHODS[name](reference_directory)
    reference = None
    if "reference" in type(method).model_fields:
        reference = type(model).from_pretrained(reference_directory).double().eval()
    pairs = sequences()
    for clip in (0.0, 0.05):
        expected_loss, expected = weighted_step(model, pairs, method, reference, clip=clip)
        for layout, (batch, accumulate, kind) in LAYOUTS.items():
            if clip and layout not in ("one batch", "accumulate 4"):
                continue
            rows = packed(pairs, 2) if kind == "packed" else padded(pairs, kind)
            found, losses, _ = train(model, rows, method, tmp_path, batch, accumulate, clip)
            assert distance(found, expected) < TOLERANCE, f"{layout}, clip {clip}"
            assert losses[0] == pytest.approx(expected_loss, abs=1e-6), layout


def test_uniform_is_the_stock_loss(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    stock, stock_losses, _ = train(tiny_llama, rows, None, tmp_path, 4, 2, clip=1.0, steps=3)
    ours, losses, handle = train(tiny_llama, rows, tw.Uniform(), tmp_path, 4, 2, clip=1.0, steps=3)
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    assert distance(ours, stock) < 1e-5 < distance(ours, tiny_llama)
    assert handle.stats["mean_weight"] == handle.stats["kept_share"] == handle.stats["effective_sample_size"] == 1


def test_selection_within_the_micro_batch_depends_on_it_by_definition(tiny_llama, reference_directory, tmp_path):
    rows = padded(sequences(), "right")
    method = tw.ExcessLoss(keep=0.3, reference=reference_directory)
    one, _, handle = train(tiny_llama, rows, method, tmp_path, 8, 1)
    two, _, _ = train(tiny_llama, rows, method, tmp_path, 2, 4)
    assert distance(one, two) > 1e-5
    assert handle.stats["kept_share"] == pytest.approx(0.3, abs=0.02)
    assert handle.stats["labels_trained"] == round(handle.stats["kept_share"] * handle.stats["labels"])


def test_bf16_autocast_trains(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    full, _, _ = train(tiny_llama, rows, tw.DFT(), tmp_path, 4, 2)
    half, losses, _ = train(tiny_llama, rows, tw.DFT(), tmp_path, 4, 2, bf16=True)
    moved = distance(full, tiny_llama)
    assert 0 < distance(full, half) < 0.1 * moved
    assert losses[0] > 0


@pytest.mark.parametrize("name", ["random", "excess_loss", "dynamic_loss"])
def test_interrupted_and_resumed_equals_uninterrupted(name, tiny_llama, reference_directory, tmp_path):
    method = {
        "random": tw.weighting.Random(keep=0.5),
        "excess_loss": tw.ExcessLoss(keep=0.5, reference=reference_directory, scope="step"),
        "dynamic_loss": tw.DynamicLoss(burn_in=3),
    }[name]
    rows = padded(sequences() + sequences(1) + sequences(2), "right")
    whole, _, _ = train(tiny_llama, rows, method, tmp_path / "whole", 2, 2, steps=5)
    train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=3, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed, _, _ = train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=5, resume=str(checkpoint))
    assert distance(whole, resumed) == 0
    assert distance(whole, tiny_llama) > 0
    with pytest.raises(InputError, match=r"was trained with .* this run weighs with"):
        train(tiny_llama, rows, tw.DFT(), tmp_path / "cut", 2, 2, steps=5, resume=str(checkpoint))


def test_undo_puts_everything_back(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(tiny_llama, arguments, train_dataset=rows)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    tiny_llama.train()
    before = tiny_llama(**batch)
    names, attributes = set(vars(tiny_llama)), dict(vars(trainer))
    callbacks = list(trainer.callback_handler.callbacks)
    with tw.weigh(trainer, tw.DFT()) as handle:
        during = tiny_llama(**batch)
        assert during.logits is None
        assert during.loss < before.loss
        tiny_llama.eval()
        assert torch.equal(tiny_llama(**batch).logits, before.logits)
        tiny_llama.train()
    handle.undo()
    after = tiny_llama(**batch)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
    assert set(vars(tiny_llama)) == names
    assert {key: value for key, value in vars(trainer).items() if key != "callback_handler"} == {
        key: value for key, value in attributes.items() if key != "callback_handler"
    }
    assert trainer.callback_handler.callbacks == callbacks


def test_undo_after_an_exception_and_under_anothers_patch(tiny_llama):
    batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None]}
    tiny_llama.train()
    before = tiny_llama(**batch).loss
    with pytest.raises(KeyError), tw.weigh(tiny_llama, tw.DFT()):
        raise KeyError
    assert "forward" not in vars(tiny_llama)
    handle = tw.weigh(tiny_llama, tw.DFT())
    inner = tiny_llama.forward
    tiny_llama.forward = lambda **inputs: inner(**inputs)  # as accelerate does for mixed precision
    handle.undo()
    assert torch.equal(tiny_llama(**batch).loss, before)


def test_a_loop_of_ones_own_accumulates_and_corrects(tiny_llama):
    model = tiny_llama.double().train()
    pairs = [pair for index, pair in enumerate(sequences()) if index != 3]
    method = FocalWeightMean()
    _, expected = weighted_step(model, pairs, method)
    labels = sum(int((labels[1:] != -100).sum()) for _, labels in pairs)
    with tw.weigh(model, method) as handle:
        for ids, targets in pairs:
            model(input_ids=ids[None], labels=targets[None], num_items_in_batch=labels).loss.backward()
        handle.correct_gradients(labels)
        assert handle.correct_gradients(labels) == 1.0
    step(model)
    assert distance(model, expected) < TOLERANCE


def test_weighted_loss_needs_no_patch(tiny_llama):
    ids, labels = sequences()[0]
    batch = {"input_ids": ids[None], "labels": labels[None]}
    column = torch.rand(1, 12)
    loss = tw.weighted_loss(tiny_llama, {**batch, "loss_weights": column}, tw.LossWeights())
    nll = F.cross_entropy(tiny_llama(ids[None]).logits[0, :-1], labels[1:], reduction="none", ignore_index=-100)
    kept = labels[1:] != -100
    torch.testing.assert_close(loss, (nll * column[0, 1:])[kept].sum() / kept.sum())
    loss.backward()
    assert tiny_llama.lm_head.weight.grad.abs().sum() > 0
    with pytest.raises(InputError, match=r"batch.labels: is missing"):
        tw.weighted_loss(tiny_llama, {"input_ids": ids[None]}, tw.DFT())
    with pytest.raises(InputError, match="reads the column 'loss_weights'"):
        tw.weighted_loss(tiny_llama, batch, tw.LossWeights())
    with pytest.raises(InputError, match="reads the column 'reference_nll'"):
        tw.weighted_loss(tiny_llama, batch, tw.Prior(reference="unread"))


def test_the_trainer_keeps_the_column_of_weights(tiny_llama, tmp_path):
    rows = [
        {**row, "loss_weights": torch.rand(12, generator=torch.Generator().manual_seed(index)), "other": index}
        for index, row in enumerate(padded(sequences(), "right"))
    ]
    found, _, handle = train(tiny_llama, rows, tw.LossWeights(), tmp_path, 4, 2)
    assert 0.3 < handle.stats["mean_weight"] < 0.7
    assert distance(found, train(tiny_llama, rows, tw.Uniform(), tmp_path, 4, 2)[0]) > 1e-4


def test_token_weights_of_a_text(tiny_llama, reference_directory):
    ids = sequences()[0][0].tolist()
    found = tw.weighting.token_weights(tiny_llama, tw.ExcessLoss(keep=0.5, reference=reference_directory), ids)
    assert found.weights[0] is None
    assert len(found.weights) == len(found.nll) == len(ids)
    assert sum(found.weights[1:]) == 6
    nll = F.cross_entropy(tiny_llama(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(torch.tensor(found.nll[1:]), nll.detach(), atol=1e-5, rtol=0)
    assert not tiny_llama.lm_head.weight.grad
    with pytest.raises(InputError, match="fewer than two tokens"):
        tw.weighting.token_weights(tiny_llama, tw.DFT(), [1])


def test_what_cannot_work_is_refused_before_anything_is_patched(tiny_llama, reference_directory, tmp_path):
    def trainer(model=tiny_llama, **options):
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options)
        return Trainer(model, arguments, train_dataset=padded(sequences(), "right"))

    with pytest.raises(InputError, match=r"label_smoothing_factor: 0\.1 replaces the loss"):
        tw.weigh(trainer(label_smoothing_factor=0.1), tw.DFT())
    with pytest.raises(InputError, match="no weighting method"):
        tw.weigh(tiny_llama, "dft")
    with pytest.raises(InputError, match="no transformers model"):
        tw.weigh(torch.nn.Linear(2, 2), tw.DFT())
    with pytest.raises(InputError, match=r"wrapped in nn.DataParallel.*torchrun"):
        tw.weigh(torch.nn.DataParallel(tiny_llama), tw.DFT())
    with pytest.raises(InputError, match=r"does not exist|cannot be reached"):
        tw.weigh(tiny_llama, tw.ExcessLoss(reference="./nowhere"))
    handle = tw.weigh(tiny_llama, tw.DFT())
    with pytest.raises(InputError, match="weighed already"):
        tw.weigh(tiny_llama, tw.DFT())
    handle.undo()
    larger = copy.deepcopy(tiny_llama)
    larger.resize_token_embeddings(80)
    with pytest.raises(InputError, match="vocabulary of 64 tokens, the model in training one of 80"):
        tw.weigh(larger, tw.ExcessLoss(reference=reference_directory))
    tiny_llama.config.logit_scale = 2.0
    with pytest.raises(InputError, match="between its backbone and its logits"):
        tw.weigh(tiny_llama, tw.DFT())
    assert "forward" not in vars(tiny_llama)


def test_labels_that_are_all_ignored_are_named(tiny_llama, tmp_path):
    rows = [{**row, "labels": torch.full((12,), -100)} for row in padded(sequences(), "right")]
    with pytest.raises(InputError, match="labels: are all -100 in the first optimizer step"):
        train(tiny_llama, rows, tw.DFT(), tmp_path)


def test_two_processes_give_the_update_of_one(tiny_llama, reference_directory, tmp_path):
    model = tiny_llama.double()
    model.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), reference_directory], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reference = type(model).from_pretrained(reference_directory).double().eval()
    for name in ("dft", "excess_loss step", "dynamic_loss step", "focal weight_mean", "focal sequence_mean"):
        method = METHODS[name](reference_directory)
        used = reference if "reference" in type(method).model_fields else None
        loss, expected = weighted_step(model, sequences(), method, used, clip=0.05)
        found = load_file(tmp_path / f"{name}.safetensors")
        theirs = expected.state_dict()
        for key, value in found.items():
            if key != "loss":
                assert (value - theirs[key]).abs().max() < TOLERANCE, f"{name}: {key}"
        assert found["loss"].item() == pytest.approx(loss, abs=1e-6)
    rows = with_sample_ids(padded(sequences(), "right"))
    expected, losses, handle = train(model, rows, tw.GLOW(), tmp_path, steps=3)
    found, theirs = load_file(tmp_path / "glow.safetensors"), expected.state_dict()
    assert found.pop("loss").item() == pytest.approx(losses[-1], abs=1e-6)
    assert max((value - theirs[key]).abs().max() for key, value in found.items()) < TOLERANCE
    for rank in (0, 1):
        history = load_file(tmp_path / f"history {rank}.safetensors")
        for name, values in handle.state.tensors().items():
            torch.testing.assert_close(history[name], values, atol=1e-6, rtol=0)


def test_lora_trains_as_with_the_stock_loss(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    stock, stock_losses, _ = train(adapted, rows, None, tmp_path, 4, 2, steps=3)
    ours, losses, _ = train(adapted, rows, tw.Uniform(), tmp_path, 4, 2, steps=3)
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    assert distance(ours, stock) < 1e-6 < distance(ours, adapted)


def test_the_head_is_checked_anew_after_mixed_precision_training(tiny_llama, tmp_path):
    """Accelerate leaves its autocast on the instance; a second weighting must see through it."""
    rows = padded(sequences(), "right")
    model, _, handle = train(tiny_llama, rows, tw.DFT(), tmp_path, 4, 2, bf16=True)
    handle.undo()
    tw.weigh(model, tw.DFT()).undo()


def test_a_whole_steps_selection_runs_the_reference_once(tiny_llama, reference_directory, tmp_path, monkeypatch):
    calls = []
    plain = ReferenceModel.nll
    monkeypatch.setattr(
        ReferenceModel, "nll", lambda self, *args, **inputs: calls.append(1) or plain(self, *args, **inputs)
    )
    method = tw.ExcessLoss(keep=0.5, reference=reference_directory, scope="step")
    train(tiny_llama, padded(sequences(), "right"), method, tmp_path, 4, 2)
    assert len(calls) == 2
