"""Unlearning on transformers' Trainer: the same update whatever the batch layout, with and without PEFT."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from layouts import forget_columns, laid_out, sequences, train
from reference_steps import TOLERANCE, distance, objective_step, step
from safetensors.torch import load_file

import tokenwise as tw
from tokenwise.errors import InputError

LAYOUTS = {
    "one batch": (8, 1, "right"),
    "one kind in each micro-batch": (2, 4, "right"),
    "an empty micro-batch": (1, 8, "right"),
    "accumulate 2, left padding": (4, 2, "left"),
    "packed": (1, 4, "packed"),
}


def rows_of(pairs, kind):
    return laid_out(pairs, kind, forget_columns(pairs))


METHODS = {
    "gradient_difference": lambda reference: tw.GradientDifference(forget_coefficient=0.3),
    "npo": lambda reference: tw.NPO(reference=reference, retain="kl"),
    "sim_npo": lambda reference: tw.SimNPO(),
    "sat_imp": lambda reference: tw.SatImp(forget_coefficient=1.0, b1=0.5),
    "undial": lambda reference: tw.UNDIAL(reference=reference, retain_coefficient=0.5),
    "ceu": lambda reference: tw.CEU(retain="nll"),
    "inverted_hinge": lambda reference: tw.InvertedHinge(),
    "asft": lambda reference: tw.ASFT(reference=reference),
}


def expected_step(model, pairs, method, reference):
    return objective_step(model, pairs, method, reference, forget_columns(pairs))


@pytest.mark.parametrize("name", METHODS)
def test_every_layout_gives_the_update_written_out_in_fp64(name, tiny_llama, reference_directory, tmp_path):
    model = tiny_llama.double()
    method = METHODS[name](reference_directory)
    reference = type(model).from_pretrained(reference_directory).double().eval()
    pairs = sequences()
    expected_loss, expected = expected_step(model, pairs, method, reference)
    for layout, (batch, accumulate, kind) in LAYOUTS.items():
        found, losses, handle = train(model, rows_of(pairs, kind), method, tmp_path, batch, accumulate)
        assert distance(found, expected) < TOLERANCE, layout
        assert losses[0] == pytest.approx(expected_loss, abs=1e-6), layout
        assert sum(value for key, value in handle.stats.items() if key.endswith("_labels")) > 0
        handle.undo()


def test_two_processes_give_the_update_of_one(tiny_llama, reference_directory, tmp_path):
    model = tiny_llama.double()
    model.save_pretrained(tmp_path / "model")
    script = Path(__file__).with_name("two_processes_unlearn.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    names = ("npo", "ceu")
    done = subprocess.run(
        [*command, str(tmp_path), reference_directory, *names], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reference = type(model).from_pretrained(reference_directory).double().eval()
    for name in names:
        loss, expected = expected_step(model, sequences(), METHODS[name](reference_directory), reference)
        found, theirs = load_file(tmp_path / f"{name}.safetensors"), expected.state_dict()
        assert found.pop("loss").item() == pytest.approx(loss, abs=1e-6)
        assert max((value - theirs[key]).abs().max().item() for key, value in found.items()) < TOLERANCE


def with_lora(model):
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))


@pytest.mark.parametrize("name", ["npo", "undial", "inverted_hinge"])
def test_a_peft_model_is_its_own_reference_and_layouts_agree(name, tiny_llama, tmp_path):
    model = with_lora(tiny_llama.double())
    saved = tmp_path / "before"
    tiny_llama_before = copy.deepcopy(model).unload()
    tiny_llama_before.save_pretrained(saved)
    method, named = METHODS[name](None), METHODS[name](str(saved))
    found = {}
    for layout in ("one batch", "one kind in each micro-batch", "accumulate 2, left padding"):
        batch, accumulate, kind = LAYOUTS[layout]
        found[layout], _, handle = train(
            model, rows_of(sequences(), kind), method, tmp_path, batch, accumulate, steps=3
        )
        trainable = [parameter.requires_grad for parameter in found[layout].parameters()]
        assert trainable == [parameter.requires_grad for parameter in model.parameters()]
        handle.undo()
    by_name, _, _ = train(model, rows_of(sequences(), "right"), named, tmp_path, 8, 1, steps=3)
    assert distance(found["one batch"], model) > 1e-3
    for other in (*found.values(), by_name):
        # Not fp64 throughout: PEFT keeps its adapters in fp32, and three steps add up.
        assert distance(found["one batch"], other) < 1e-5


def test_a_copy_is_the_reference_of_a_model_without_adapters(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "before")
    rows = rows_of(sequences(), "right")
    own, losses, _ = train(tiny_llama, rows, METHODS["npo"](None), tmp_path, 8, 1, steps=3)
    named, named_losses, _ = train(tiny_llama, rows, METHODS["npo"](str(tmp_path / "before")), tmp_path, 8, 1, steps=3)
    assert distance(own, named) < 1e-6 < distance(own, tiny_llama)
    assert losses == pytest.approx(named_losses)
    assert losses[0] == pytest.approx(20 * torch.tensor(2.0).log().item(), rel=1e-5)  # 2 / beta * log 2 before any step


@pytest.mark.parametrize("name", ["npo", "undial", "sat_imp"])
def test_bf16_autocast_trains(name, tiny_llama, reference_directory, tmp_path):
    rows, method = rows_of(sequences(), "right"), METHODS[name](reference_directory)
    full, losses, _ = train(tiny_llama, rows, method, tmp_path, 4, 2)
    half, half_losses, _ = train(tiny_llama, rows, method, tmp_path, 4, 2, bf16=True)
    assert 0 < distance(full, half) < 0.1 * distance(full, tiny_llama)
    assert half_losses == pytest.approx(losses, rel=0.02)


def test_a_missing_term_is_a_differentiable_zero(tiny_llama):
    ids, labels = sequences()[0]
    tiny_llama.train()
    with tw.weigh(tiny_llama, tw.InvertedHinge(retain_coefficient=0.5)) as handle:
        for value in (0, 1):
            batch = {"input_ids": ids[None], "labels": labels[None], "forget": torch.full((1, len(ids)), value)}
            tiny_llama.zero_grad()
            loss = tiny_llama(**batch).loss
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny_llama.parameters())
            assert tiny_llama.lm_head.weight.grad.any()
    assert handle.stats["forget_labels"] == handle.stats["retain_labels"] == int((labels[1:] != -100).sum())


def test_a_loop_of_ones_own_names_the_step(tiny_llama):
    model = tiny_llama.double().train()
    method = METHODS["sim_npo"](None)
    pairs = sequences()
    expected_loss, expected = expected_step(model, pairs, method, model)
    rows = rows_of(pairs, "right")
    batches = [{key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in (0, 2, 4, 6)]
    with tw.weigh(model, method) as handle:
        handle.begin_step(batches)
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
    assert sum(losses).item() == pytest.approx(expected_loss, abs=1e-6)
    step(model)
    assert distance(model, expected) < TOLERANCE


def test_undo_puts_everything_back(tiny_llama):
    model = with_lora(tiny_llama).train()
    batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None]}
    before = model(**batch)
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = tw.weigh(model, tw.NPO(retain="kl"))
    model(**batch, forget=torch.ones(1, 10)).loss.backward()
    model.eval()
    assert torch.equal(model(**batch, forget=torch.ones(1, 10)).logits, before.logits)
    model.train()
    handle.undo()
    after = model(**batch)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert all(module.training for module in model.modules())


def test_what_cannot_work_is_refused(tiny_llama, tmp_path):
    batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None]}
    with pytest.raises(InputError, match="reads the column 'forget', which the batch does not have"):
        tw.weighted_loss(tiny_llama, batch, tw.GradientAscent())
    with pytest.raises(InputError, match=r"NPO reads a reference model, which is not here\. Use weigh"):
        tw.weighted_loss(tiny_llama, {**batch, "forget": torch.ones(1, 10)}, tw.NPO())
    loss = tw.weighted_loss(tiny_llama, {**batch, "forget": torch.ones(1, 10)}, tw.GradientAscent())
    assert loss.item() == pytest.approx(-tiny_llama(**batch).loss.item(), rel=1e-5)
    model = with_lora(tiny_llama)
    with pytest.raises(InputError, match="carries adapters that are not in reach"):
        tw.weigh(model.get_base_model(), tw.NPO())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with pytest.raises(InputError, match="without its adapters is not the model as it is now"):
        tw.weigh(model, tw.NPO())
    assert "forward" not in vars(model.get_base_model())


def test_interrupted_and_resumed_equals_uninterrupted(tiny_llama, tmp_path):
    rows, method = rows_of(sequences(), "right"), tw.NPO(beta=0.5, retain="kl")
    whole, _, _ = train(tiny_llama, rows, method, tmp_path / "whole", 2, 2, steps=4)
    train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=2, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed, _, _ = train(tiny_llama, rows, method, tmp_path / "cut", 2, 2, steps=4, resume=str(checkpoint))
    assert distance(whole, resumed) == 0
    assert distance(whole, tiny_llama) > 0
    with pytest.raises(InputError, match="this run weighs with"):
        train(tiny_llama, rows, tw.NPO(), tmp_path / "cut", 2, 2, steps=4, resume=str(checkpoint))
