"""FILA's start of LoRA: the official code's numbers, and a model that computes what it did."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_parameter_masks import GOLDEN, batches, golden_batches, golden_model
from transformers import GPT2Config, GPT2LMHeadModel

from tokenwise.errors import InputError
from tokenwise.weighting.fila import fila_initialize, fisher_information, row_importance, weighted_factors


def adapted(model, **options):
    options = {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 6, **options}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.Linear)
    }


def test_numbers_of_the_official_code():
    golden = GOLDEN["fila"]
    model = golden_model()
    weights = {name: model.get_parameter(f"{name}.weight") for name in golden["row_importance"]}
    forget, retain = (fisher_information(model, weights, golden_batches(which)) for which in ("forget", "retain"))
    for name, expected in golden["row_importance"].items():
        torch.testing.assert_close(
            row_importance(forget[name], retain[name]), torch.tensor(expected), rtol=1e-4, atol=1e-5
        )
    model = adapted(model, **{name: golden[name] for name in ("target_modules", "r", "lora_alpha")})
    fila_initialize(model, golden_batches("forget"), golden_batches("retain"))
    assert set(layers(model)) == set(golden["product"])
    for name, layer in layers(model).items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, torch.tensor(golden["product"][name]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            layer.get_base_layer().weight, torch.tensor(golden["residual"][name]), rtol=1e-3, atol=2e-4
        )


@pytest.mark.parametrize("iterations", [2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_what_it_did(tiny_llama, dtype, iterations):
    model = adapted(tiny_llama.to(dtype)).eval()
    ids = batches(3)[0]["input_ids"]
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    logits = model(ids).logits.float()
    state = torch.get_rng_state()
    fila_initialize(model, batches(0), batches(1), iterations=iterations)
    assert torch.equal(torch.get_rng_state(), state)
    bound = 1e-4 if dtype == torch.float32 else 0.02
    assert (model(ids).logits - logits).abs().max() < bound * logits.abs().max()
    for name, layer in layers(model).items():
        base = layer.get_base_layer().weight
        assert base.dtype == dtype
        whole = base.float() + layer.get_delta_weight("default").float()
        torch.testing.assert_close(whole, before[name].float(), rtol=bound, atol=bound)
        assert (base - before[name]).abs().max() > 0.1 * before[name].abs().max()
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable
    assert all("lora" in name for name in trainable)
    assert all(value.grad is None for value in model.parameters())


def test_equal_importance_is_the_truncated_decomposition_and_full_rank_is_everything():
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    a, b = weighted_factors(weight, torch.full((6,), 7.0), rank=2, scaling=3.0, iterations=None)
    left, singular, right = torch.linalg.svd(weight)
    best = left[:, :2] * singular[:2] @ right[:2]
    torch.testing.assert_close(3.0 * b @ a, best, rtol=1e-4, atol=1e-4)
    importance = torch.rand(6, generator=torch.Generator().manual_seed(1)) + 0.1
    for iterations in (2, None):
        a, b = weighted_factors(weight, importance, rank=5, scaling=0.5, iterations=iterations)
        torch.testing.assert_close(0.5 * b @ a, weight, rtol=1e-3, atol=1e-3)
    important = torch.tensor([100.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    a, b = weighted_factors(weight, important, rank=1, scaling=1.0, iterations=None)
    error = (b @ a - weight).norm(dim=1) / weight.norm(dim=1)
    assert error[0] < 0.01
    assert error[1:].min() > 0.3


def test_information_weighs_batches_by_their_labels(tiny_llama):
    weights = {"x": tiny_llama.model.layers[0].mlp.up_proj.weight}
    given = batches(0, 2)
    given[1]["labels"][:2] = -100
    total, labels = torch.zeros_like(weights["x"]), 0
    for batch in given:
        model = copy.deepcopy(tiny_llama).eval()
        model(**batch).loss.backward()
        count = int((batch["labels"] != -100).sum())
        total += model.model.layers[0].mlp.up_proj.weight.grad ** 2 * count
        labels += count
    torch.testing.assert_close(fisher_information(tiny_llama, weights, given)["x"], total / labels)


def test_peft_converts_it_into_a_plain_adapter_of_the_original_model(tiny_llama, tmp_path):
    original = copy.deepcopy(tiny_llama)
    model = adapted(tiny_llama)
    fila_initialize(model, batches(0), batches(1))
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora" in name:
                value += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    ids = batches(3)[0]["input_ids"]
    trained = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    plain = peft.PeftModel.from_pretrained(original, str(tmp_path / "adapter")).eval()
    assert plain.peft_config["default"].r == 6
    torch.testing.assert_close(plain(ids).logits, trained, atol=1e-4, rtol=1e-4)
    assert (original.lm_head.weight == model.base_model.model.lm_head.weight).all()


def test_transposed_layers():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    ids = batches(3)[0]["input_ids"]
    model = adapted(model, target_modules=["c_attn"], fan_in_fan_out=True).eval()
    before = model(ids).logits
    weight = model.base_model.model.transformer.h[0].attn.c_attn.get_base_layer().weight
    assert weight.shape == (8, 24)
    original = weight.clone()
    fila_initialize(model, batches(0), batches(1))
    assert not torch.equal(weight, original)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_initialised_is_refused(tiny_llama):
    with pytest.raises(InputError, match="carries no adapter"):
        fila_initialize(tiny_llama, batches(0), batches(1))
    fresh = copy.deepcopy(tiny_llama)
    two = adapted(fresh)
    two.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="carries 2 adapters"):
        fila_initialize(two, batches(0), batches(1))
    with pytest.raises(InputError, match=r"embed_tokens: is a Embedding, not linear"):
        fila_initialize(adapted(copy.deepcopy(tiny_llama), target_modules=["embed_tokens"]), batches(0), batches(1))
    with pytest.raises(InputError, match="is no plain LoRA layer"):
        fila_initialize(adapted(copy.deepcopy(tiny_llama), use_dora=True), batches(0), batches(1))
    with pytest.raises(InputError, match="has a rank of 40"):
        fila_initialize(adapted(copy.deepcopy(tiny_llama), r=40), batches(0), batches(1))
    model = adapted(copy.deepcopy(tiny_llama))
    with pytest.raises(InputError, match="retain: has no batch"):
        fila_initialize(model, batches(0), [])
    fila_initialize(model, batches(0), batches(1))
    with pytest.raises(InputError, match="has a factor B other than zero"):
        fila_initialize(model, batches(0), batches(1))
