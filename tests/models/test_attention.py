"""Attention read while the model runs equals what eager attention returns, on every layout."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tokenwise.errors import InputError
from tokenwise.models.attention import attention_to, last_attention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=5),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=5, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}


def build(name, implementation):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation).eval()


def layout():
    """Two rows of 14, the second padded on the right; labels in two runs, as in a chat of two turns."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (2, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labelled = torch.zeros(2, 14, dtype=torch.bool)
    labelled[0, 6:] = labelled[1, 4:6] = labelled[1, 8:10] = True
    sequences = torch.arange(2).unsqueeze(1).expand(2, 14)
    return ids, mask, labelled, sequences


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_equals_eager_attention(name, implementation):
    if name in ("gemma2", "gpt_oss") and implementation == "sdpa":
        pytest.skip("transformers offers no sdpa for capped scores, and none with sinks")
    model, eager = build(name, implementation), build(name, "eager")
    ids, mask, labelled, sequences = layout()
    counted = ~labelled
    with attention_to(model, labelled, counted, sequences, mask) as mass:
        during = model(input_ids=ids, attention_mask=mask).logits
    maps = eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[-1]
    expected = (maps.mean(1) * counted.unsqueeze(1)).sum(-1) * labelled
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=0)
    assert mass[0, 6] > 0.1
    assert torch.equal(during, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_sequences_attend_to_themselves_alone(implementation):
    model = build("llama", implementation)
    ids, _, labelled, _ = layout()
    lengths = (9, 5)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    sequences = torch.tensor([[0] * 9 + [1] * 5])
    labelled = torch.zeros(1, 14, dtype=torch.bool)
    labelled[0, 4:9] = labelled[0, 11:] = True
    with attention_to(model, labelled, ~labelled, sequences) as packed:
        model(input_ids=ids[:1], position_ids=positions, use_cache=False)
    for start, stop in ((0, 9), (9, 14)):
        part = (slice(0, 1), slice(start, stop))
        with attention_to(model, labelled[part], ~labelled[part], sequences[part]) as alone:
            model(input_ids=ids[part])
        torch.testing.assert_close(packed[part], alone, atol=1e-6, rtol=0)


@torch.no_grad()
def test_flash_style_masks_are_made_from_the_batch(monkeypatch):
    """Flash kernels get no map but a padding mask, or nothing: rows are then masked by sequence and padding."""
    model = build("mistral", "sdpa")
    ids, mask, labelled, sequences = layout()
    with attention_to(model, labelled, ~labelled, sequences, mask) as expected:
        model(input_ids=ids, attention_mask=mask)
    module = last_attention(model)
    plain = module.forward

    def without_map(*args, attention_mask=None, **rest):
        return plain(*args, attention_mask=None, **rest)

    monkeypatch.setattr(module, "forward", without_map)
    with attention_to(model, labelled, ~labelled, sequences, mask) as found:
        model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_everything_is_put_back_also_after_an_error():
    model = build("llama", "sdpa")
    module = last_attention(model)
    assert module.layer_idx == 1
    before, known = copy.copy(vars(module)), set(transformers.AttentionInterface._global_mapping)
    _, mask, labelled, sequences = layout()

    def failing():
        assert module.config is not model.config
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"), attention_to(model, labelled, ~labelled, sequences, mask):
        failing()
    assert module.config is model.config
    assert vars(module).keys() == before.keys()
    assert set(transformers.AttentionInterface._global_mapping) == known


def test_what_cannot_be_read_is_refused():
    model = build("llama", "sdpa")
    _, mask, labelled, sequences = layout()
    with pytest.raises(InputError, match="does not call"), attention_to(model, labelled, ~labelled, sequences, mask):
        pass
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(InputError, match="has no attention"):
        last_attention(model)
