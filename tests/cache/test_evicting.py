"""The cache that evicts: exact at a full budget, equal to hiding, rows independent, memory freed, undone exactly."""

import contextlib
import gc

import pytest
import torch
import transformers
from small_decoders import KINDS, decoder, difference, generate, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import tokenwise as tw
from small_vision_language import batch_for, vision_language
from tokenwise.errors import InputError

METHODS = {
    "snap_kv": lambda **fields: tw.SnapKV(**{"keep": 0.5, "queries": 8, **fields}),
    "k_norm": lambda **fields: tw.KNorm(**{"keep": 0.5, "sink": 2, "recent": 4, **fields}),
    "h2o": lambda **fields: tw.H2O(**{"keep": 0.5, "recent": 4, **fields}),
    "streaming_llm": lambda **fields: tw.StreamingLLM(**{"keep": 0.5, **fields}),
    "tova": lambda **fields: tw.TOVA(**{"keep": 0.5, **fields}),
    "observed_attention": lambda **fields: tw.ObservedAttention(**{"keep": 0.5, "recent": 4, **fields}),
    "pyramid_kv": lambda **fields: tw.PyramidKV(**{"keep": 0.5, "queries": 8, **fields}),
    "ada_kv": lambda **fields: tw.AdaKV(**{"keep": 0.5, "queries": 8, **fields}),
    "critical_kv": lambda **fields: tw.CriticalKV(**{"keep": 0.5, "queries": 8, **fields}),
    "chunk_kv": lambda **fields: tw.ChunkKV(**{"keep": 0.5, "queries": 8, "chunk": 5, **fields}),
    "keyformer": lambda **fields: tw.Keyformer(**{"keep": 0.5, **fields}),
    "sp_atten_cache": lambda **fields: tw.SpAttenCache(**{"keep": 0.5, **fields}),
    "key_diff": lambda **fields: tw.KeyDiff(**{"keep": 0.5, "recent": 4, **fields}),
    "lag_kv": lambda **fields: tw.LagKV(**{"keep": 0.5, "lag": 6, **fields}),
    "expected_attention": lambda **fields: tw.ExpectedAttention(**{"keep": 0.5, "recent": 4, "future": 32, **fields}),
    "kv_zip": lambda **fields: tw.KVzip(**{"keep": 0.5, "chunk": 16, "instruction": [3, 4], **fields}),
    "think": lambda **fields: tw.ThinK(**{"keep": 0.5, "queries": 8, **fields}),
    "random": lambda **fields: tw.cache.Random(**{"keep": 0.5, **fields}),
}
ALLOCATIONS = ("evenly", "pyramid", "heads", "layers_and_heads")


@pytest.mark.parametrize("kind", KINDS)
def test_all_kept_is_the_stock_cache_to_the_bit(kind):
    model, ids = decoder(kind), prompt()
    stock = generate(model, ids, DynamicCache(config=model.config))
    with tw.evict(model, tw.H2O(keep=1.0)) as cache:
        found = generate(model, ids, cache)
        assert difference(stock, found) == 0
    assert difference(stock, generate(model, ids)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_evicting_equals_hiding(kind, method):
    model, ids = decoder(kind), prompt()
    stock = generate(model, ids)
    with tw.evict(model, METHODS[method]()) as cache, tw.evict(model, METHODS[method](), masked=True) as hidden:
        evicted, masked = generate(model, ids, cache), generate(model, ids, hidden)
        assert difference(evicted, masked) < 2e-5
        assert difference(evicted, stock) > 1e-2
        full = [index for index, layer in enumerate(cache.layers) if index in cache._places]
        assert all(torch.equal(cache.kept(index), hidden.kept(index)) for index in full)
        # Heads of different lengths are given room for 64 more tokens each, which is more than the prompt here.
        assert cache.nbytes() < hidden.nbytes() or cache.method.allocate != "evenly"


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("method", ["snap_kv", "h2o", "streaming_llm"])
def test_budgets_are_exact_however_they_are_shared_out(allocate, method):
    model, ids = decoder(), prompt(43)
    method = METHODS[method](allocate=allocate, interval=None, keep=0.47)
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        model(ids, past_key_values=cache)
        kept = torch.stack([cache.kept(index) for index in range(3)])
        assert int(kept.sum()) == 20 * kept.shape[0] * kept.shape[2]
        assert cache.nbytes() == int(kept.sum()) * 2 * 8 * 4
        assert cache.stats["tokens_stored"] == 20
        assert cache.stats["bytes"] == cache.nbytes()
        assert cache.stats["full_bytes"] == 43 * 3 * 2 * 2 * 8 * 4
        uneven = allocate == "pyramid" or (allocate != "evenly" and not isinstance(method, tw.StreamingLLM))
        assert (len(set(kept.sum(3).flatten().tolist())) > 1) == uneven
        model(ids, past_key_values=hidden)
        following = prompt(5, seed=1)
        one, other = model(following, past_key_values=cache).logits, model(following, past_key_values=hidden).logits
        assert float((one - other).abs().max()) < 2e-5
        one, other = (model(following[:, :1], past_key_values=which).logits for which in (cache, hidden))
        assert float((one - other).abs().max()) < 2e-5
        assert all(torch.equal(cache.kept(index), hidden.kept(index)) for index in range(3))


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_is_as_it_is_alone(method, allocate):
    model = decoder()
    rows = [prompt(40), prompt(27, seed=1)]
    padded = torch.stack([torch.nn.functional.pad(row[0], (40 - row.shape[1], 0)) for row in rows])
    if method == "random":
        pytest.skip("its numbers are drawn by the shape")
    if method == "sp_atten_cache" and "heads" in allocate:
        pytest.skip("its heads store the same")
    with tw.evict(model, METHODS[method](allocate=allocate)) as cache:
        together = generate(model, padded, cache, attention_mask=(padded != 0).long())
    for place, row in enumerate(rows):
        with tw.evict(model, METHODS[method](allocate=allocate)) as cache:
            alone = generate(model, row, cache)
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert float((one[place] - other[0]).abs().max()) < 2e-5


@pytest.mark.parametrize("allocate", ["evenly", "heads"])
def test_beams_and_several_answers_follow_their_rows(allocate):
    model, ids = decoder(), prompt(30, rows=2)
    method = METHODS["h2o"](allocate=allocate)
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        found = generate(model, ids, cache, num_beams=3, num_return_sequences=2, output_scores=True)
        expected = generate(model, ids, hidden, num_beams=3, num_return_sequences=2, output_scores=True)
        assert torch.equal(found.sequences, expected.sequences)
        assert float((found.sequences_scores - expected.sequences_scores).abs().max()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_read_in_pieces_and_held_is_as_in_one(method):
    model, ids = decoder(), prompt(41)
    method = METHODS[method](interval=None)
    with tw.evict(model, method) as whole, tw.evict(model, method) as pieces:
        one = model(ids[:, :40], past_key_values=whole)
        with pieces.held():
            for part in ids[:, :40].split((1, 13, 25, 1), 1):  # a piece of one token ends nothing
                other = model(part, past_key_values=pieces)
            assert pieces.kept(0).all()
        assert float((one.logits[:, -1] - other.logits[:, -1]).abs().max()) < 1e-5
        assert all(torch.equal(whole.kept(index), pieces.kept(index)) for index in range(3))
        one, other = (model(ids[:, 40:], past_key_values=cache).logits for cache in (whole, pieces))
        assert float((one - other).abs().max()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [16, 13])  # the last piece has eight tokens, or one
def test_generating_from_a_prompt_read_in_pieces(method, size):
    model, ids, method = decoder(), prompt(40), METHODS[method]()
    with tw.evict(model, method) as whole, tw.evict(model, method) as pieces:
        one = generate(model, ids, whole)
        with pieces.held(until=40):
            other = generate(model, ids, pieces, prefill_chunk_size=size)
        assert difference(one, other) < 2e-5
        assert all(torch.equal(whole.kept(index), pieces.kept(index)) for index in whole.places)


def test_how_long_a_cache_is_held():
    model, ids, method = decoder(), prompt(60), METHODS["snap_kv"](queries=4)
    with tw.evict(model, method) as cache:
        with cache.held(until=40):
            model(ids[:, :39], past_key_values=cache)
            assert cache.layers[0].stored == 39
            model(ids[:, 39:40], past_key_values=cache)
            # With the piece that reaches it, and not when the block is left.
            assert cache.layers[0].stored == 20
            model(ids[:, 40:41], past_key_values=cache)
            assert cache.layers[0].stored == 21
        with pytest.raises(InputError, match="41 tokens that the cache has seen"), cache.held(until=41):
            pass
        with cache.held(until=100):
            model(ids[:, 41:], past_key_values=cache)
            assert cache.layers[0].stored == 40
        # Fewer were read.
        assert cache.layers[0].stored == 30
        stopped = contextlib.suppress(ZeroDivisionError)
        with stopped, cache.held():
            model(ids[:, :4], past_key_values=cache)
            raise ZeroDivisionError
        assert cache.layers[0].stored == 34
        model(ids[:, :1], past_key_values=cache)
        assert cache.layers[0].stored == 35


def test_without_being_held_every_piece_is_evicted_from():
    model, ids = decoder(), prompt(40)
    with tw.evict(model, METHODS["h2o"]()) as cache:
        sizes = []
        hook = model.model.layers[0].register_forward_pre_hook(lambda *args: sizes.append(cache.layers[0].stored))
        generate(model, ids, cache, prefill_chunk_size=16, max_new_tokens=1)
        hook.remove()
        # 8 of 16, 16 of 32.
        assert sizes == [0, 8, 16]


def test_many_budgets_from_one_prompt():
    model, ids = decoder(), prompt(40)
    method = METHODS["snap_kv"](keep=1.0)
    with tw.evict(model, method, masked=True) as cache:
        model(ids[:, :39], past_key_values=cache)
        for allocate in ALLOCATIONS:
            cache.method = method.replace(allocate=allocate)
            for keep in (0.3, 0.6):
                shared = cache.with_keep(keep)
                assert shared.layers[0].keys is cache.layers[0].keys
                with tw.evict(model, method.replace(allocate=allocate, keep=keep)) as evicted:
                    model(ids[:, :39], past_key_values=evicted)
                    one, other = (model(ids[:, 39:], past_key_values=each).logits for each in (shared, evicted))
                assert float((one - other).abs().max()) < 1e-5
                assert all(torch.equal(shared.kept(index), evicted.kept(index)) for index in range(3))
        assert cache.get_seq_length() == 39
    with tw.evict(model, METHODS["snap_kv"](), masked=True) as cache, pytest.raises(InputError, match="keep=1"):
        cache.with_keep(0.3)


def test_a_pass_that_breaks_off_is_forgotten():
    model, ids = decoder(), prompt(30)
    with tw.evict(model, METHODS["k_norm"]()) as expected, tw.evict(model, METHODS["k_norm"]()) as cache:
        for which in (expected, cache):
            model(ids, past_key_values=which)
        broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], past_key_values=cache)
        broken.remove()
        assert cache.get_seq_length() == 30
        one, other = (model(ids[:, :1], past_key_values=which).logits for which in (expected, cache))
        assert torch.equal(one, other)


def test_a_prompt_that_breaks_off_leaves_an_empty_cache():
    model, ids = decoder(), prompt(30)
    with (
        tw.evict(model, METHODS["h2o"](allocate="heads")) as expected,
        tw.evict(model, METHODS["h2o"](allocate="heads")) as cache,
    ):
        broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        broken.remove()
        assert cache.get_seq_length() == 0
        one, other = (generate(model, ids, which) for which in (expected, cache))
        assert difference(one, other) == 0


def test_another_cache_is_none_of_its_business():
    model, ids = decoder(), prompt()
    stock = generate(model, ids)
    with tw.evict(model, METHODS["h2o"]()):
        assert difference(stock, generate(model, ids)) == 0
        assert difference(stock, generate(model, ids, use_cache=False)) < 1e-4


def test_it_ends_when_it_is_undone_or_dropped():
    model, ids = decoder(), prompt()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    cache = tw.evict(model, METHODS["h2o"]())
    model(ids, past_key_values=cache)
    cache.undo()
    cache.undo()
    with pytest.raises(InputError, match="was undone"):
        model(ids[:, :1], past_key_values=cache)
    cache = tw.evict(model, METHODS["h2o"]())
    model(ids, past_key_values=cache)
    gc.disable()
    del cache
    gc.enable()
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys()
        assert all(after[name][key] is value for key, value in attributes.items() if not isinstance(value, dict | bool))
        assert not after[name]["_forward_pre_hooks"]


def test_memory_is_freed_layer_by_layer():
    model, ids = decoder(), prompt(200)
    with tw.evict(model, METHODS["snap_kv"](keep=0.25)) as cache:
        sizes = []
        model.model.layers[2].register_forward_pre_hook(lambda *args: sizes.append(cache.nbytes()))
        model(ids, past_key_values=cache)
    assert sizes == [2 * 50 * 2 * 2 * 8 * 4]


def test_bytes_hold_as_many_tokens_as_fit():
    model, ids = decoder("gemma2"), prompt(60, rows=2)
    # A token of both rows takes 2 x 2 heads x 32 channels x 4 bytes in each layer; the window holds 7.
    token = 2 * 2 * 32 * 4
    with tw.evict(model, tw.KNorm(keep=f"{token * (7 + 2 * 11) + 30} bytes")) as cache:
        model(ids, past_key_values=cache)
        assert cache.stats["tokens_stored"] == 11
        assert cache.nbytes() == token * (7 + 2 * 11)


def test_what_cannot_work_is_refused_before_the_prompt():
    model = decoder()
    with pytest.raises(InputError, match="less than the 12 tokens that stay"):
        tw.evict(model, tw.SnapKV(keep="10 tokens", queries=8, sink=4))
    with pytest.raises(InputError, match=r"384 bytes each, in 3 layers"):
        tw.evict(model, tw.KNorm(keep="300 bytes"))
    with pytest.raises(InputError, match="no layer whose cache holds all tokens"):
        tw.evict(MistralForCausalLM(MistralConfig(**vars_of(model), sliding_window=8)), tw.KNorm())
    with pytest.raises(InputError, match="is no cache policy"):
        tw.evict(model, tw.FastV())
    with pytest.raises(InputError, match="AttentionInterface"):
        tw.evict(torch.nn.Linear(2, 2), tw.KNorm())
    scaled = LlamaForCausalLM(
        LlamaConfig(**vars_of(model), rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    )
    with pytest.raises(InputError, match="changes with the length"):
        tw.evict(scaled, tw.StreamingLLM())
    with tw.evict(model, tw.KNorm()) as cache, pytest.raises(InputError, match="Pad on the left"):
        model(prompt(8), attention_mask=torch.tensor([[1] * 6 + [0] * 2]), past_key_values=cache)
    with tw.evict(model, tw.KNorm()) as cache:
        with pytest.raises(InputError, match="assisted"):
            model.generate(prompt(8), past_key_values=cache, assistant_model=decoder(), max_new_tokens=4)
        assert cache.get_seq_length() == 0
    with pytest.raises(InputError, match="is compiled"):
        tw.evict(torch.compile(model), tw.KNorm())


def vars_of(model):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(model.config, name) for name in names}


def test_a_short_prompt_keeps_what_is_protected():
    model = decoder()
    with tw.evict(model, tw.SnapKV(keep=0.25)) as cache:
        model(prompt(20), past_key_values=cache)
        assert cache.stats["tokens_stored"] == 20
    with tw.evict(model, tw.SnapKV(keep=0.25)) as cache:
        model(prompt(100), past_key_values=cache)
        assert cache.stats["tokens_stored"] == 64


def test_bf16():
    model, ids = decoder().bfloat16(), prompt()
    with tw.evict(model, METHODS["h2o"](allocate="heads")) as cache:
        generate(model, ids, cache)
        assert cache.layers[0].flat_keys.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma"])
def test_the_language_part_of_a_vision_language_model(kind):
    model = vision_language(kind)
    rows = [["a", 5], ["a", 8]] if kind == "paligemma" else [[3, "a", 2], [4, "a", 6]]
    batch = batch_for(kind, model, rows)

    def answers(cache):
        return generate(model, cache=cache, eos_token_id=None, **batch)

    stock = answers(None)
    for method in (METHODS["snap_kv"](queries=4), METHODS["h2o"](recent=2, allocate="heads")):
        with tw.evict(model, method.replace(keep=1.0)) as cache:
            assert difference(stock, answers(cache)) == 0
        with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
            found = answers(cache)
            assert difference(found, answers(hidden)) < 1e-5
            assert difference(found, stock) > 1e-3
            assert cache.stats["tokens_stored"] < 0.6 * cache.stats["tokens_seen"]


def test_caches_of_several_budgets_do_not_write_to_each_other():
    model, ids = decoder(), prompt(60)
    with tw.evict(model, METHODS["snap_kv"](keep=1.0), masked=True) as cache:
        model(ids, past_key_values=cache)
        for token in (5, 6):
            model(torch.tensor([[token]]), past_key_values=cache)
        one, other = cache.with_keep(0.3), cache.with_keep(0.6)
        with tw.evict(model, METHODS["snap_kv"](keep=1.0), masked=True) as fresh:
            model(ids, past_key_values=fresh)
            for token in (5, 6):
                model(torch.tensor([[token]]), past_key_values=fresh)
            alone = fresh.with_keep(0.3)
            expected = [model(torch.tensor([[token]]), past_key_values=alone).logits for token in (7, 8)]
        found = []
        for token in (7, 8):
            found.append(model(torch.tensor([[token]]), past_key_values=one).logits)
            model(torch.tensor([[token + 20]]), past_key_values=other)
            model(torch.tensor([[token + 40]]), past_key_values=cache)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_padding_that_no_mask_tells_is_refused():
    model, ids = decoder(), prompt(8)

    def like_flash(module, query, key, value, attention_mask, **options):
        plain = transformers.AttentionInterface()["sdpa"]
        return plain(module, query, key, value, None, **options)

    transformers.AttentionInterface.register("like_flash", like_flash)
    transformers.AttentionMaskInterface.register(
        "like_flash", lambda *args, attention_mask=None, **options: attention_mask
    )
    model.config._attn_implementation_internal = "like_flash"
    try:
        with tw.evict(model, METHODS["k_norm"]()) as cache:
            model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
            assert cache.stats["tokens_stored"] == 6
        with tw.evict(model, METHODS["k_norm"]()) as cache, pytest.raises(InputError, match="read one row at a time"):
            model(ids, attention_mask=torch.tensor([[0] * 2 + [1] * 6]), past_key_values=cache)
    finally:
        transformers.AttentionInterface._global_mapping.pop("like_flash")
        transformers.AttentionMaskInterface._global_mapping.pop("like_flash")


def test_attention_can_be_asked_for_while_generated_tokens_are_scored():
    model, ids = decoder(), prompt()
    model.set_attn_implementation("eager")
    with tw.evict(model, tw.H2O(keep=0.5)) as cache, tw.evict(model, tw.H2O(keep=0.5), masked=True) as masked:
        one, other = (generate(model, ids, which, output_attentions=True).attentions for which in (cache, masked))
    for step, hidden in zip(one[1:], other[1:], strict=True):
        for layer, whole in zip(step, hidden, strict=True):
            assert layer.shape[3] < whole.shape[3]
            found, expected = layer.sort(3).values, whole.sort(3).values[..., -layer.shape[3] :]
            assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_bytes_too_few_for_the_rows_are_refused_before_the_pass(kind):
    model = decoder(kind)
    width, window = (8, 0) if kind == "llama" else (16, 7)
    token, layers = 2 * 2 * width * 4, 3 if kind == "llama" else 2
    # Two rows of four tokens each, which stay, beside the window of both.
    limit = 2 * token * (window + layers * 4)
    entered = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *args: entered.append(1))
    method = tw.KNorm(keep=f"{limit} bytes", sink=2, recent=2)
    with tw.evict(model, method) as cache, pytest.raises(InputError, match=r"hold \d tokens of this batch, and 4 must"):
        model(prompt(30, rows=3), past_key_values=cache)
    assert not entered
    assert cache.get_seq_length() == 0
    with tw.evict(model, method) as cache:
        model(prompt(30, rows=2), past_key_values=cache)
        assert cache.nbytes() == limit
    with tw.evict(model, method.replace(keep=f"{limit - 1} bytes")) as cache, pytest.raises(InputError, match="hold 3"):
        model(prompt(30, rows=2), past_key_values=cache)
    hook.remove()
    assert len(entered) == 1
