"""Parts of a conversation of every length, with every method: what is evicted equals what is hidden."""

import pytest
import torch
from conversations import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import decoder, prompt

import tokenwise as tw

MODELS = {kind: decoder(kind) for kind in ("llama", "gemma2")}
KEEPS = st.sampled_from([0.03, 0.25, 0.37, 0.8, "9 tokens", "20 tokens", "9000 bytes"])
PARTS = st.lists(st.sampled_from([1, 2, 5, 12, 17, 33]), min_size=1, max_size=4)


@given(name=st.sampled_from(list(METHODS)), keep=KEEPS, parts=PARTS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_evicting_equals_hiding_however_a_conversation_is_read(name, keep, parts, data):
    method = METHODS[name].replace(keep=keep, recent=2)
    model = MODELS[data.draw(st.sampled_from(list(MODELS)))]
    if name != "sp_atten_cache":
        shares = ["evenly", "pyramid", "heads", "layers_and_heads"]
        method = method.replace(allocate=data.draw(st.sampled_from(shares)))
    if name != "kv_zip":
        method = method.replace(interval=data.draw(st.sampled_from([None, 1, 3])))
    if name != "think":
        method = method.replace(positions=data.draw(st.sampled_from(["original", "compact"])))
    pads = torch.tensor([[0], [data.draw(st.integers(0, parts[0] - 1))]])
    ids = prompt(sum(parts), 2)
    mask = (torch.arange(ids.shape[1]) >= pads).long()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for masked in (False, True):
        with torch.no_grad(), tw.evict(model, method, masked=masked) as cache:
            logits, end = [], 0
            for part in parts:
                start, end = end, end + part
                options = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
                logits.append(model(ids[:, start:end], past_key_values=cache, **options).logits)
                assert cache.get_seq_length() == end
            kept = torch.stack([cache.kept(index) for index in cache.places])
        found.append((torch.cat(logits, 1) * mask.unsqueeze(2), kept & mask[:, None].bool()))
    (evicted, stored), (hidden, shown) = found
    assert float((evicted - hidden).abs().max()) < 1e-4
    assert torch.equal(stored, shown)


@pytest.mark.parametrize("tokens", [16, 17, 33])
def test_a_last_repetition_of_one_token_is_forgotten_too(tokens):
    model = decoder()
    for masked in (False, True):
        with torch.no_grad(), tw.evict(model, tw.KVzip(keep=0.5, chunk=16), masked=masked) as cache:
            model(prompt(tokens), past_key_values=cache)
            assert cache.get_seq_length() == tokens
            assert cache.layers[0].stored <= tokens
            assert int(cache.kept(0).sum() + cache.kept(1).sum() + cache.kept(2).sum()) == (tokens + 1) // 2 * 6
