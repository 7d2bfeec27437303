"""Heads of real architectures, and patches that undo."""

from __future__ import annotations

import pytest
import torch
import transformers

from tokenwise.errors import InputError
from tokenwise.models.head import base_of, check_head, last_hidden, output_head
from tokenwise.models.patch import replace_attribute

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", GPT2),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
        ("gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("olmo2", {}),
        ("phi", {}),
        ("gpt_neox", {"rotary_pct": 1.0}),
    ],
)
def test_backbone_and_head_give_the_models_own_logits(kind, options):
    torch.manual_seed(0)
    base = {} if kind == "gpt2" else SMALL
    config = transformers.AutoConfig.for_model(kind, **{**base, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    check_head(model)
    head = output_head(model)
    ids = torch.randint(50, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(head.logits(last_hidden(model, input_ids=ids)), model(ids).logits)
    assert head.weight is model.get_output_embeddings().weight


def test_what_has_no_such_head_is_refused(tiny_llama):
    with pytest.raises(InputError, match="no linear output head"):
        output_head(tiny_llama.model)
    tiny_llama.config.final_logit_softcapping = 0.5  # a soft cap the model's forward does not apply
    with pytest.raises(InputError, match="between its backbone and its logits"):
        check_head(tiny_llama)


def test_peft_is_seen_through_and_an_adapter_on_the_head_refused(tiny_llama):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert base_of(wrapped) is tiny_llama
    check_head(tiny_llama)
    on_head = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(InputError, match="LoRA"):
        output_head(base_of(on_head))


def test_a_replaced_attribute_comes_back_exactly():
    class Thing:
        value = 1

    thing = Thing()
    undo = replace_attribute(thing, "value", 2)
    inner = replace_attribute(thing, "value", 3)
    inner()
    assert thing.value == 2
    undo()
    assert thing.value == 1
    assert vars(thing) == {}
    undo()
    undo = replace_attribute(thing, "value", 2)
    thing.value = "theirs"
    undo()
    assert thing.value == "theirs"
