"""Tiers: exact and packed tokens under one budget of bytes."""

import pytest
import torch
from small_decoders import KINDS, decoder, difference, generate, prompt

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.tiered_kv import TieredLayer
from tokenwise.signals.packing import packed_nbytes

METHODS = {
    "snap_kv": lambda **fields: tw.SnapKV(**{"keep": 0.4, "queries": 8, **fields}),
    "k_norm": lambda **fields: tw.KNorm(**{"keep": 0.4, "sink": 2, "recent": 4, **fields}),
    "h2o": lambda **fields: tw.H2O(**{"keep": 0.4, "recent": 4, **fields}),
    "streaming_llm": lambda **fields: tw.StreamingLLM(**{"keep": 0.4, "positions": "original", **fields}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_more_tokens_in_no_more_bytes(kind, bits):
    model, ids = decoder(kind), prompt(43)
    for name, make in METHODS.items():
        with tw.evict(model, make(interval=None)) as plain, tw.evict(model, make(bits=bits, interval=None)) as tiered:
            for cache in (plain, tiered):
                model(ids, past_key_values=cache)
            fit = packed_nbytes(plain.layers[-1].keys.shape[3], bits) - 1
            assert plain.nbytes() - fit * 2 * plain.layers[-1].key_heads * 3 < tiered.nbytes() <= plain.nbytes()
            assert tiered.stats["bytes"] == tiered.nbytes()
            for index in tiered.places:
                layer = tiered.layers[index]
                assert isinstance(layer, TieredLayer)
                assert layer.keys is None
                assert layer.stored > plain.layers[index].stored
                exact, kept = layer.is_exact(), tiered.kept(index)
                if name == "k_norm":
                    protected = torch.isin(layer.positions, torch.tensor([0, 1, 39, 40, 41, 42]))
                    assert bool((exact | ~protected.expand_as(exact)).all())
                # The exact ones are the best, and those of the plain cache are among all.
                assert bool((kept | ~plain.kept(index)).all())
                assert int(exact.sum(2).max()) <= plain.layers[index].stored


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", METHODS)
def test_attention_reads_each_token_as_it_is_stored(method, bits):
    """The same as a cache that keeps those tokens exactly, each packed one rounded in place."""
    model, ids = decoder("qwen3"), prompt(40)
    method = METHODS[method](bits=bits, interval=None)
    with tw.evict(model, method) as tiered, tw.evict(model, method.replace(bits=None)) as rounded:
        model(ids, past_key_values=tiered)
        with rounded.held():
            model(ids, past_key_values=rounded)
            for index in rounded.places:
                layer, tiers = rounded.layers[index], tiered.layers[index]
                tiers.tracks["exact"] = tiers.is_exact()
                whole = tiers.whole()
                exact = whole.tracks["exact"]
                del tiers.tracks["exact"]
                layer.keep(whole.positions, None)
                assert torch.equal(layer.keys[exact], whole.keys[exact])
                assert torch.equal(layer.values[exact], whole.values[exact])
                reach = (layer.keys.amax(3) - layer.keys.amin(3)) / (2**bits - 1) / 2
                assert bool(((layer.keys - whole.keys).abs().amax(3) <= reach + 1e-5).all())
                assert not torch.equal(layer.keys, whole.keys)
                layer.keys, layer.values = whole.keys, whole.values
            rounded.method = method.replace(bits=None, keep=1.0)
        for token in prompt(5, seed=1).split(1, 1):
            one, other = (model(token, past_key_values=cache).logits for cache in (tiered, rounded))
            assert float((one - other).abs().max()) < 2e-5


def test_rounding_costs_little_at_8_bits():
    model, ids = decoder(), prompt(40)
    stock = generate(model, ids)
    # Three exact tokens in ten have the bytes of most of them at 8 bits.
    with tw.evict(model, tw.KNorm(keep=0.7, bits=8)) as tiered, tw.evict(model, tw.KNorm(keep=0.7)) as plain:
        fine, coarse = generate(model, ids, tiered), generate(model, ids, plain)
    assert tiered.layers[0].stored >= 40
    assert difference(fine, stock) < 0.1 * difference(coarse, stock)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocate", ["evenly", "pyramid"])
def test_a_padded_row_is_as_it_is_alone(method, allocate):
    model, method = decoder(), METHODS[method](bits=8, allocate=allocate)
    rows = [prompt(40), prompt(27, seed=1)]
    padded = torch.stack([torch.nn.functional.pad(row[0], (40 - row.shape[1], 0)) for row in rows])
    with tw.evict(model, method) as cache:
        together = generate(model, padded, cache, attention_mask=(padded != 0).long())
        kept = [cache.kept(index) for index in cache.places]
    for place, row in enumerate(rows):
        with tw.evict(model, method) as cache:
            alone = generate(model, row, cache)
            for index in cache.places:
                assert torch.equal(kept[index][place, :, 40 - row.shape[1] :], cache.kept(index)[0])
        # A channel between two codes may go either way, by the last bit of its key.
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert float((one[place] - other[0]).abs().max()) < 0.05


def test_beams_a_second_turn_and_passes_that_break_off():
    model, ids = decoder(), prompt(30, rows=2)
    method = METHODS["snap_kv"](bits=4)
    with tw.evict(model, method) as cache, tw.evict(model, method) as again:
        found = generate(model, ids, cache, num_beams=3, num_return_sequences=2)
        assert torch.equal(found.sequences, generate(model, ids, again, num_beams=3, num_return_sequences=2).sequences)
        cache.reset()
        again.reset()
        for which in (cache, again):
            model(ids, past_key_values=which)
            model(prompt(9, rows=2, seed=1), past_key_values=which)
        broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], past_key_values=cache)
        broken.remove()
        assert cache.get_seq_length() == 39
        one, other = (model(ids[:, :1], past_key_values=which).logits for which in (cache, again))
        assert float((one - other).abs().max()) < 1e-4


def test_beams_follow_their_rows():
    model, ids = decoder(), prompt(30)
    with tw.evict(model, METHODS["k_norm"](bits=8)) as cache:
        model(ids.expand(2, -1), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        found = model(ids[:, :1].expand(2, -1), past_key_values=cache).logits
    with tw.evict(model, METHODS["k_norm"](bits=8)) as cache:
        model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=cache).logits
    assert float((found - expected).abs().max()) < 2e-5


def test_a_prompt_read_in_pieces_and_held_is_as_in_one():
    model, ids = decoder(), prompt(41)
    method = METHODS["snap_kv"](bits=8)
    with tw.evict(model, method) as whole, tw.evict(model, method) as pieces:
        model(ids, past_key_values=whole)
        with pieces.held():
            for part in ids.split(16, 1):
                model(part, past_key_values=pieces)
        # A second hold unpacks and packs again.
        with pieces.held():
            pass
        assert all(torch.equal(whole.kept(index), pieces.kept(index)) for index in whole.places)
        one, other = (model(ids[:, :1], past_key_values=cache).logits for cache in (whole, pieces))
        assert float((one - other).abs().max()) < 0.05


def test_bytes_hold_both_tiers():
    model = decoder("gemma2")
    rows = [prompt(60), prompt(20, seed=1)]
    padded = torch.stack([torch.nn.functional.pad(row[0], (60 - row.shape[1], 0)) for row in rows])
    token = 2 * 2 * 32 * 4
    limit = token * (7 + 2 * 21) + 30
    for ids in (prompt(60, rows=2), padded):
        with tw.evict(model, tw.KNorm(keep=f"{limit} bytes", bits=4)) as cache:
            generate(model, ids, cache, attention_mask=(ids != 0).long(), max_new_tokens=1)
            assert limit - token < cache.nbytes() <= limit
            assert cache.kept(1)[0].sum(1).tolist() == [cache.layers[1].stored] * 2


def test_what_does_not_go_together_is_refused():
    model = decoder()
    with pytest.raises(InputError, match="packed keys are not turned"):
        tw.evict(model, tw.StreamingLLM(bits=8))
    for allocate in ("heads", "layers_and_heads"):
        with pytest.raises(InputError, match="heads share a budget"):
            tw.evict(model, tw.KNorm(bits=4, allocate=allocate))
    with pytest.raises(InputError, match="stores all tokens exactly"):
        tw.evict(model, tw.KNorm(bits=4), masked=True)
    with pytest.raises(InputError, match="bits"):
        tw.KNorm(bits=3)
