"""Attention with a sink in each head: what is read, computed and kept follows the attention that the model has."""

import copy

import pytest
import torch
from small_decoders import decoder, difference, generate, prompt
from torch.nn.functional import pad

import tokenwise as tw
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.rotary import find_rotary
from tokenwise.models.tap import listen


def hear(model, listener):
    stops = [
        listen(module, lambda call, index=index: listener(index, call))
        for index, module in cached_attentions(model).items()
    ]
    return lambda: [stop() for stop in stops]


def test_what_is_read_is_what_the_model_says():
    model, ids = decoder("gpt_oss"), prompt(40, rows=2)
    ids[1, :9] = 0
    mask = (ids != 0).long()
    calls = {}
    stop = hear(model, calls.__setitem__)
    maps = model(ids, attention_mask=mask, output_attentions=True).attentions
    stop()
    assert len(calls) == 3
    for index, call in calls.items():
        torch.testing.assert_close(call.sinks, model.model.layers[index].self_attn.sinks)
        torch.testing.assert_close(call.rows(torch.arange(40)), maps[index], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(call.columns(), maps[index].mean(2), atol=1e-6, rtol=1e-5)
        assert float(call.columns().sum(2).min()) < 0.9


def test_a_query_answered_here_is_as_the_model_answers_it():
    model, ids = decoder("gpt_oss"), prompt(40)
    stock = generate(model, ids)
    read = []

    def compute(index, call):
        if call.query.shape[2] == 1:
            call.compute()
            read.append(float((call.rows(torch.zeros(1, dtype=torch.long))[:, :, 0] - call.columns()).abs().max()))

    stop = hear(model, compute)
    found = generate(model, ids)
    stop()
    assert difference(stock, found) < 1e-5
    assert len(read) == 15
    assert max(read) < 1e-6


def test_scores_are_of_the_attention_that_the_model_has(monkeypatch):
    model, ids = decoder("gpt_oss"), prompt(40)
    maps = model(torch.cat([ids, ids], 1), output_attentions=True).attentions[1:]
    first = torch.stack([each[0, :, :40, :40] for each in maps]).unflatten(1, (2, 2))
    again = torch.stack([each[0, :, 40:, :40] for each in maps]).unflatten(1, (2, 2))
    last = first[..., -8:, :].mean((2, 3))
    last[..., -8:] = 0
    received = first.sum((2, 3))
    expected = {
        tw.SnapKV(queries=8, kernel=1): last,
        tw.H2O(): received,
        tw.Keyformer(gumbel=False, tau_start=1.0): received,
        tw.TOVA(): first[:, :, :, -1].mean((1, 2)).unsqueeze(1),
        tw.KVzip(): again.amax((2, 3)),
    }
    for method, scores in expected.items():
        found = {}
        plain = type(method).score
        with monkeypatch.context() as patch:
            patch.setattr(
                type(method),
                "score",
                lambda self, tokens, plain=plain, found=found: found.setdefault(tokens.layer, plain(self, tokens)),
            )
            with tw.evict(model, method) as cache:
                model(ids, past_key_values=cache)
        found = torch.stack([found[layer][0] for layer in range(2)])
        free = slice(4, None) if isinstance(method, tw.KVzip) else slice(None)  # the first stay anyway
        torch.testing.assert_close(found[..., free], scores[..., free], atol=1e-5, rtol=1e-4)


METHODS = {
    "snap_kv": tw.SnapKV(keep=0.5, queries=8),
    "heads": tw.AdaKV(keep=0.5, queries=8, interval=2),
    "all heads": tw.H2O(keep=0.5, allocate="layers_and_heads"),
    "tiers": tw.H2O(keep=0.5, bits=8),
    "tova": tw.TOVA(keep=0.5),
    "keyformer": tw.Keyformer(keep=0.5),
    "kv_zip": tw.KVzip(keep=0.5, chunk=16),
    "compact": tw.StreamingLLM(keep=0.5, positions="compact"),
    "expected_attention": tw.ExpectedAttention(keep=0.5, future=16),
    "quest": tw.Quest(keep=0.5, page=4, dense_layers=0),
    "token_select": tw.TokenSelect(keep="20 tokens", sink=2, recent=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_padded_row_is_as_it_is_alone(name):
    model, method = decoder("gpt_oss"), METHODS[name]
    rows = [prompt(40), prompt(27, seed=1)]
    padded = torch.cat([pad(row, (40 - row.shape[1], 0)) for row in rows])
    with tw.evict(model, method) as cache:
        together = generate(model, padded, cache, attention_mask=(padded != 0).long())
    for place, row in enumerate(rows):
        with tw.evict(model, method) as cache:
            alone = generate(model, row, cache)
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert float((one[place] - other[0]).abs().max()) < 2e-5


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tiers"])
def test_a_further_turn_is_as_if_the_others_were_hidden(name):
    model, method, ids = decoder("gpt_oss"), METHODS[name], prompt(47)
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        for part in ids.split([40, 1, 6], 1):
            one, other = (model(part, past_key_values=which).logits for which in (cache, hidden))
            assert float((one - other).abs().max()) < 2e-5
    assert float((one - model(ids).logits[:, -6:]).abs().max()) > 1e-2


def test_a_copy_goes_on_where_the_prompt_ended():
    model, ids = decoder("gpt_oss"), prompt(40)
    with tw.evict(model, tw.SnapKV(keep=0.5, queries=8, interval=1)) as cache:
        model(ids[:, :38], past_key_values=cache)
        with copy.deepcopy(cache) as other:
            found = [model(ids[:, 38:], past_key_values=which).logits for which in (cache, other)]
    assert torch.equal(*found)


def test_keys_are_turned_as_the_model_turns_them():
    model, ids = decoder("gpt_oss"), prompt(12)
    places, keys, queries = torch.arange(12), [], []

    def note(index, call):
        if index == 0:
            keys.append(call.key)
            queries.append(call.query)

    stop = hear(model, note)
    for ahead in (0, 5):
        model(ids, position_ids=places[None] + ahead)
    stop()
    layer = model.model.layers[0]
    rotary = find_rotary(model, layer.self_attn)
    torch.testing.assert_close(rotary.turn(keys[0], torch.full((1, 1, 12), 5)), keys[1], atol=1e-5, rtol=1e-5)
    hidden = layer.input_layernorm(model.get_input_embeddings()(ids))
    expected = layer.self_attn.q_proj(hidden).unflatten(2, (4, -1)).transpose(1, 2)
    scale = model.model.rotary_emb.attention_scaling
    torch.testing.assert_close(rotary.turn_back(queries[0], places), expected * scale, atol=1e-5, rtol=1e-5)
