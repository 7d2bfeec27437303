"""Models some of whose layers do not turn their keys: compact positions and expected attention leave them so."""

import accelerate
import pytest
import torch
from small_decoders import GROUPED, KINDS, decoder, difference, generate, prompt
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)
from transformers.models.smollm3.modeling_smollm3 import apply_rotary_pos_emb

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.rotary import find_rotaries
from tokenwise.models.tap import listen

STREAMING = tw.StreamingLLM(keep="20 tokens", interval=1)


def pairs_of(model):
    return {index: len(rotary.frequencies) for index, rotary in find_rotaries(model, cached_attentions(model)).items()}


def read(model, cache, *parts):
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_which_layers_turn_their_keys_is_found_out(dtype):
    assert pairs_of(decoder("smollm3").to(dtype)) == {0: 4, 1: 0, 2: 4}
    assert pairs_of(decoder("cohere2").to(dtype)) == {0: 4, 1: 0, 2: 0}
    for kind in KINDS:
        assert min(pairs_of(decoder(kind).to(dtype)).values()) > 0


def test_layers_of_several_kinds_and_offloaded_ones_are_tried(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    options = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 4}
    gemma = Gemma4ForCausalLM(Gemma4TextConfig(**GROUPED, **options, layer_types=kinds))
    sliding, *full = pairs_of(gemma).values()
    assert 0 < sliding < min(full)
    model = accelerate.disk_offload(decoder("smollm3"), str(tmp_path), torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert pairs_of(model) == {0: 4, 1: 0, 2: 4}
    assert {each.device.type for each in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("kind", "plain"), [("smollm3", [1]), ("cohere2", [1, 2])])
def test_keys_that_the_model_does_not_turn_are_stored_as_they_are(kind, plain, monkeypatch):
    model, ids = decoder(kind), prompt(46)
    with tw.evict(model, STREAMING) as cache:
        own = {index: [] for index in cache.places}
        update = cache.update

        def note(keys, values, index, *args, **options):
            own.get(index, []).append(keys)
            return update(keys, values, index, *args, **options)

        monkeypatch.setattr(cache, "update", note)
        read(model, cache, *ids.split([40, *[1] * 6], 1))
        for index in cache.places:
            layer = cache.layers[index]
            assert layer.stored == 20
            assert int(layer.tracks["shift"].max()) == 26
            positions = layer.positions.expand(-1, 2, -1).unsqueeze(3).expand_as(layer.keys)
            same = torch.equal(layer.keys, torch.cat(own[index], 2).gather(2, positions))
            assert same == (index in plain)


def test_compact_positions_are_those_of_the_stock_model_with_what_is_left():
    model, ids = decoder("smollm3"), prompt(45)
    with tw.evict(model, STREAMING.replace(interval=None)) as cache:
        found = read(model, cache, *ids.split([40, 5], 1))[:, 40:]
    stock = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=stock)
    stay = torch.cat([torch.arange(4), torch.arange(24, 40)])
    for index, layer in enumerate(stock.layers):
        layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]
        if index != 1:
            sinks = layer.keys[:, :, :4]
            turn = model.model.rotary_emb(sinks, torch.full((1, 4), 20))
            layer.keys = torch.cat([apply_rotary_pos_emb(sinks, sinks, *turn)[1], layer.keys[:, :, 4:]], 2)
    expected = model(ids[:, 40:], past_key_values=stock, position_ids=torch.arange(40, 45)[None]).logits
    assert float((found - expected).abs().max()) < 1e-4


def test_where_no_layer_turns_its_keys_compact_positions_change_nothing():
    model, parts = decoder("cohere2"), prompt(46).split([40, 1, 5], 1)
    found = []
    for positions in ("original", "compact"):
        with tw.evict(model, STREAMING.replace(positions=positions)) as cache:
            found.append(read(model, cache, *parts))
    assert torch.equal(*found)


METHODS = {
    "streaming_llm": tw.StreamingLLM(keep=0.5),
    "heads": tw.SnapKV(keep=0.5, queries=4, allocate="heads", positions="compact"),
    "all heads": tw.H2O(keep=0.5, allocate="layers_and_heads", positions="compact"),
    "random": tw.cache.Random(keep=0.5, positions="compact", interval=3),
    "expected_attention": tw.ExpectedAttention(keep=0.5, future=16),
    "expected_attention, compact": tw.ExpectedAttention(keep=0.5, positions="compact", interval=1),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["smollm3", "cohere2"])
def test_evicting_equals_hiding_and_keeping_all_is_stock(kind, name):
    model, method, ids = decoder(kind), METHODS[name], prompt(47, rows=2)
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        for part in ids.split([40, 1, 6], 1):
            one, other = (model(part, past_key_values=which).logits for which in (cache, hidden))
            assert float((one - other).abs().max()) < 2e-5
    assert float((one - model(ids).logits[:, -6:]).abs().max()) > 1e-2
    with tw.evict(model, method.replace(keep=1.0)) as cache:
        assert difference(generate(model, ids, cache), generate(model, ids)) == 0


@pytest.mark.parametrize("kind", ["smollm3", "cohere2"])
def test_expected_attention_takes_queries_as_they_are_where_none_are_turned(kind, monkeypatch):
    model, ids, found, calls = decoder(kind), prompt(40), {}, {}
    plain = tw.ExpectedAttention.score

    def note(self, tokens):
        return found.setdefault(tokens.layer, plain(self, tokens)).clone()

    monkeypatch.setattr(tw.ExpectedAttention, "score", note)
    listen(cached_attentions(model)[1], lambda call: calls.setdefault(1, call))
    with tw.evict(model, tw.ExpectedAttention(keep=0.5, future=16)) as cache:
        model(ids, past_key_values=cache)
        place = cache.places.index(1)
    queries, keys = calls[1].query[0, :, 4:].double(), calls[1].key[0, :, 4:].double().repeat_interleave(2, 0)
    mean = queries.mean(1, keepdim=True)
    spread = (queries - mean).mT @ (queries - mean) / 36
    logits = (keys * mean).sum(2) * calls[1].scaling
    logits += ((keys @ spread) * keys).sum(2) * calls[1].scaling ** 2 / 2
    expected = logits.softmax(1).unflatten(0, (2, 2)).mean(1) * calls[1].value[0, :, 4:].double().norm(dim=2)
    assert float((found[place][0, :, 4:] - expected).abs().max()) < 1e-5


def test_nothing_is_left_of_the_trial():
    model = decoder("smollm3")
    attention = model.model.layers[1].self_attn
    # Keys then differ from call to call.
    attention.k_proj = nn.Sequential(attention.k_proj, nn.Dropout())
    model.train()
    attention.q_proj.eval()
    before, heard = {module: module.training for module in model.modules()}, []
    stop = listen(attention, heard.append)
    assert pairs_of(model) == {0: 4, 1: 0, 2: 4}
    stop()
    assert not heard
    assert {module: module.training for module in model.modules()} == before
    assert "forward" not in vars(attention)
    assert not attention.config._attn_implementation.endswith(str(id(attention)))


@pytest.mark.parametrize(
    ("method", "fix"), [(tw.StreamingLLM(), "positions='original'"), (tw.ExpectedAttention(), "such as snap_kv")]
)
def test_layers_that_turn_otherwise_or_cannot_be_tried_are_refused(method, fix):
    # Its rotary channels stand behind others.
    options = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    options |= {"qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 3, "n_routed_experts": 8}
    behind = DeepseekV3ForCausalLM(DeepseekV3Config(**{**GROUPED, **options}))
    with pytest.raises(InputError, match=f"layer 0 of DeepseekV3ForCausalLM turns them otherwise.*{fix}"):
        tw.evict(behind, method)
    broken = decoder("smollm3")
    broken.model.layers[0].self_attn.k_proj = torch.nn.Linear(7, 16)
    with pytest.raises(InputError, match=f"how layer 0 of SmolLM3ForCausalLM turns them cannot be tried.*{fix}"):
        tw.evict(broken, method)
    # Without weights there is nothing to be turned, and a plan is checked.
    tw.evict(decoder("smollm3").to("meta"), method).undo()
