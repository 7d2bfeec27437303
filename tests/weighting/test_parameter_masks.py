"""Masks of parameters are the official code's, and what they leave out stays bit for bit what it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tokenwise as tw
from tokenwise import catalog
from tokenwise.cli.methods import comparable, python_line
from tokenwise.comparison.entries import read_methods
from tokenwise.comparison.tasks import LanguageModeling
from tokenwise.errors import InputError
from tokenwise.weighting.parameter_masks import (
    LargestGradients,
    LargestWeights,
    RandomParameters,
    Wagle,
    load_masks,
    mask_parameters,
    save_masks,
    wagle_scores,
    weighting_gradients,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "parameter_importance.json").read_text(encoding="utf-8"))


def golden_model():
    model = LlamaForCausalLM(LlamaConfig(**GOLDEN["config"], tie_word_embeddings=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(GOLDEN["parameters"][name]))
    return model


def golden_batches(which):
    return [{name: torch.tensor(values) for name, values in batch.items()} for batch in GOLDEN["batches"][which]]


def batches(seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(64, (3, 9), generator=generator)
        found.append({"input_ids": ids, "labels": ids.masked_fill(torch.rand(3, 9, generator=generator) < 0.3, -100)})
    return found


@pytest.mark.parametrize(
    "method",
    [Wagle(keep=0.6, mu=1e-3), LargestGradients(keep=0.6), LargestWeights(keep=0.6)],
    ids=lambda m: m.card.name,
)
def test_masks_are_those_of_the_official_code(method):
    model = golden_model()
    forget, retain = golden_batches("forget"), golden_batches("retain")
    masks = method.masks(model, forget, retain)
    theirs = GOLDEN["masks"][method.card.name]
    found = torch.cat([masks[name].flatten() for name, _ in model.named_parameters()])
    assert found.tolist() == [bool(kept) for kept in theirs["kept"]]
    gradients = [weighting_gradients(model, given) for given in (forget, retain)]
    used = gradients[: len(method.reads)]
    scores = [
        method.scores(parameter.detach(), *(part[name] for part in used), generator=torch.Generator()).flatten()
        for name, parameter in model.named_parameters()
    ]
    torch.testing.assert_close(torch.cat(scores), torch.tensor(theirs["scores"]), rtol=2e-4, atol=1e-4)


def test_scores_of_worked_numbers():
    parameter, forget, retain = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5]), torch.tensor([0.1, 0.2])
    # |(2 - 0.1 / 0.1) * 3| and |(-1 - 0.2 / 0.1) * 0.5|
    torch.testing.assert_close(wagle_scores(parameter, forget, retain, 0.1), torch.tensor([3.0, 1.5]))
    snip = wagle_scores(parameter, forget, torch.zeros(2), 1e-6)
    torch.testing.assert_close(snip, (parameter * forget).abs())


def test_gradients_are_sums_over_batches_and_leave_no_trace(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.norm.weight.requires_grad = False
    mine = torch.ones_like(tiny_llama.lm_head.weight)
    tiny_llama.lm_head.weight.grad = mine
    found = weighting_gradients(tiny_llama, batches(0, 3))
    assert tiny_llama.training
    assert tiny_llama.lm_head.weight.grad is mine
    assert torch.equal(mine, torch.ones_like(mine))
    assert "model.norm.weight" not in found
    assert not tiny_llama.model.norm.weight.requires_grad
    assert sum(parameter.grad is not None for parameter in tiny_llama.parameters()) == 1

    plain = copy.deepcopy(tiny_llama).eval()
    plain.zero_grad()
    for batch in batches(0, 3):
        plain(**batch).loss.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_random_masks_have_an_exact_count_and_follow_the_seed(tiny_llama):
    method = RandomParameters(keep=0.3)
    one, again, other = (method.masks(tiny_llama, seed=seed) for seed in (1, 1, 2))
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())
    assert sum(int(mask.sum()) for mask in one.values()) == int(0.3 * total + 0.5)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_only_trainable_parameters_are_ranked(tiny_llama):
    adapted = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj"], r=2))
    masks = Wagle(keep=0.5).masks(adapted, batches(0), batches(1))
    assert set(masks) == {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert all("lora" in name for name in masks)


def rows(count=8):
    ids = torch.randint(64, (count, 9), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model, folder, masks=None, method=None, steps=3, **options):
    model = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"weight_decay": 0.3, "gradient_accumulation_steps": 2, **options},
    )
    trainer = Trainer(model, arguments, train_dataset=rows())
    if method is not None:
        tw.weigh(trainer, method)
    handle = mask_parameters(trainer, masks) if masks is not None else None
    trainer.train()
    return model, trainer, handle


@pytest.mark.parametrize("options", [{}, {"optim": "sgd", "optim_args": "momentum=0.9"}, {"bf16": True}], ids=str)
def test_masked_entries_stay_bit_identical_and_the_others_train(tiny_llama, tmp_path, options):
    masks = RandomParameters(keep=0.6).masks(tiny_llama)
    found, _, handle = train(tiny_llama, tmp_path, masks, tw.DFT(), **options)
    for name, parameter in found.named_parameters():
        before = tiny_llama.get_parameter(name)
        assert torch.equal(parameter[~masks[name]], before[~masks[name]]), name
        assert (parameter[masks[name]] != before[masks[name]]).float().mean() > 0.5, name
    total = sum(parameter.numel() for parameter in tiny_llama.parameters())
    assert handle.stats == {"parameters": total, "parameters_trained": int(0.6 * total + 0.5)}


def test_a_mask_changes_nothing_else(tiny_llama, tmp_path):
    """Against AdamW written out, on gradients clipped before the mask."""
    masks = RandomParameters(keep=0.6).masks(tiny_llama)
    found, _, _ = train(tiny_llama, tmp_path, masks, steps=1, gradient_accumulation_steps=4, max_grad_norm=0.1)
    whole, _, _ = train(tiny_llama, tmp_path, steps=1, gradient_accumulation_steps=4, max_grad_norm=0.1)
    for name, parameter in found.named_parameters():
        expected = torch.where(masks[name], whole.get_parameter(name), tiny_llama.get_parameter(name))
        assert torch.equal(parameter, expected), name


def test_a_share_of_one_is_the_same_training(tiny_llama, tmp_path):
    masks = Wagle(keep=1.0).masks(tiny_llama, batches(0), batches(1))
    found, _, _ = train(tiny_llama, tmp_path, masks)
    plain, _, _ = train(tiny_llama, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), plain.parameters(), strict=True))


def test_undo_lets_everything_train_again(tiny_llama, tmp_path):
    masks = RandomParameters(keep=0.2).masks(tiny_llama)
    _, trainer, handle = train(tiny_llama, tmp_path, masks, steps=1)
    callbacks = len(trainer.callback_handler.callbacks)
    handle.undo()
    assert len(trainer.callback_handler.callbacks) == callbacks - 1
    before = copy.deepcopy(trainer.model)
    trainer.train()
    name = "model.layers.0.mlp.up_proj.weight"
    changed = trainer.model.get_parameter(name) != before.get_parameter(name)
    assert changed[~masks[name]].float().mean() > 0.9


def test_an_optimizer_with_momentum_of_earlier_steps(tiny_llama):
    tiny_llama.train()
    optimizer = torch.optim.AdamW(tiny_llama.parameters(), lr=1e-2, weight_decay=0.5)

    def step():
        for batch in batches(0):
            tiny_llama(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    masks = LargestGradients(keep=0.5).masks(tiny_llama, batches(0))
    before = {name: value.detach().clone() for name, value in tiny_llama.named_parameters()}
    with mask_parameters(optimizer, masks, tiny_llama):
        step()
        for name, value in tiny_llama.named_parameters():
            assert torch.equal(value[~masks[name]], before[name][~masks[name]]), name
            assert not torch.equal(value, before[name]), name
    step()
    name = "lm_head.weight"
    changed = tiny_llama.get_parameter(name)[~masks[name]] != before[name][~masks[name]]
    assert changed.float().mean() > 0.9


def test_masks_are_saved_and_loaded(tiny_llama, tmp_path):
    method = RandomParameters(keep=0.25)
    masks = method.masks(tiny_llama)
    save_masks(masks, tmp_path / "masks.safetensors", method)
    found = load_masks(tmp_path / "masks.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "masks.safetensors"]
    assert set(found) == set(masks)
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    with pytest.raises(InputError, match=r"does not exist. Did you mean .*masks\.safetensors"):
        load_masks(tmp_path / "mask.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="tensors that are no masks"):
        load_masks(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="cannot be read"):
        load_masks(tmp_path / "broken.safetensors")


def test_what_does_not_fit_is_refused(tiny_llama, tmp_path):
    optimizer = torch.optim.SGD(tiny_llama.parameters(), lr=1.0)
    good = torch.ones_like(tiny_llama.lm_head.weight, dtype=torch.bool)
    masks = {"lm_hed.weight": good, "lm_head.weight": good.float(), "model.norm.weight": good}
    with pytest.raises(InputError) as caught:
        mask_parameters(optimizer, masks, tiny_llama)
    messages = [str(problem) for problem in caught.value.problems]
    assert "Did you mean 'lm_head.weight'?" in messages[0]
    assert "torch.float32" in messages[1]
    assert "has shape (64, 32), the parameter (32,)" in messages[2]
    with pytest.raises(InputError, match="model: is missing"):
        mask_parameters(optimizer, {})
    trainer = Trainer(tiny_llama, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    trainer.is_fsdp_enabled = True
    with pytest.raises(InputError, match=r"args\.fsdp: cuts parameters into pieces"):
        mask_parameters(trainer, {"lm_head.weight": good})
    with pytest.raises(InputError, match="retain: is missing: Wagle reads its gradient"):
        Wagle().masks(tiny_llama, batches(0))
    with pytest.raises(InputError, match="forget: has no batch"):
        LargestGradients().masks(tiny_llama, [])
    with pytest.raises(InputError, match="no weighting method"):
        tw.weigh(tiny_llama, Wagle())


def test_the_catalog_says_how_to_use_them(monkeypatch):
    entries = {entry["name"]: entry for entry in catalog.generate()}
    assert entries["wagle"]["traits"] == {"reads": ["forget", "retain"], "kind": "masks"}
    assert not comparable(entries["wagle"])
    assert python_line(entries["wagle"]) == (
        "tw.weighting.mask_parameters(trainer, tw.weighting.Wagle(keep=0.95, mu=1e-06)"
        ".masks(model, forget=forget_batches, retain=retain_batches))"
    )
    monkeypatch.setattr(catalog, "entries", lambda: {entry["id"]: entry for entry in entries.values()})
    problems = []
    read_methods(["wagle"], Path(), problems, LanguageModeling)
    assert "gives masks of parameters" in str(problems[0])
