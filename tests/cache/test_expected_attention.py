"""Expected attention against its formula in fp64, and its statistics when a prompt is read in pieces."""

import pytest
import torch
from small_decoders import KINDS, decoder, prompt

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.rotary import find_rotary
from tokenwise.models.tap import listen


def calls_of(model, ids):
    """The attention call of each layer, by index."""
    found, stops = {}, []
    for index, module in cached_attentions(model).items():
        stops.append(listen(module, lambda call, index=index: found.update({index: call})))
    model(ids)
    for stop in stops:
        stop()
    return found


def score_of(monkeypatch, model, method, *pieces):
    found = {}
    plain = type(method).score
    monkeypatch.setattr(
        type(method), "score", lambda self, tokens: found.setdefault(tokens.layer, plain(self, tokens)).clone()
    )
    with tw.evict(model, method) as cache, cache.held():
        for piece in pieces:
            model(piece, past_key_values=cache)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_the_score_is_the_expectation_of_normal_queries(kind, monkeypatch):
    model, ids = decoder(kind), prompt(40)
    found = score_of(monkeypatch, model, tw.ExpectedAttention(keep=0.5, future=16, epsilon=0.01), ids)
    for index, call in calls_of(model, ids).items():
        rotary = find_rotary(model, call.module)
        heads, width = call.query.shape[1], call.query.shape[3]
        turns = torch.stack([rotary.mean_turn(torch.tensor([place]), width).T for place in range(56)]).double()
        queries = torch.einsum("tij,bhtj->bhti", turns[:40].mT, call.query.double())[0, :, 4:]
        mean, turn = queries.mean(1), turns[40:].mean(0)
        scores = torch.empty(heads, 36, dtype=torch.float64)
        for head in range(heads):
            away = queries[head] - mean[head]
            spread = turn @ (away.T @ away / 36) @ turn.T
            keys = call.key[0, head // (heads // call.key.shape[1]), 4:].double()
            logits = keys @ turn @ mean[head] * call.scaling
            logits += torch.einsum("ti,ij,tj->t", keys, spread, keys) * call.scaling**2 / 2
            scores[head] = logits.softmax(0)
        scores = scores.unflatten(0, (call.key.shape[1], -1)).mean(1) + 0.01
        scores = scores * call.value[0, :, 4:].double().norm(dim=2)
        assert float((found[index][0, :, 4:] - scores).abs().max()) < 1e-5


def test_pieces_add_up_to_the_statistics_of_the_whole(monkeypatch):
    model, ids = decoder(), prompt(40)
    method = tw.ExpectedAttention(keep=0.5)
    whole = score_of(monkeypatch, model, method, ids)
    pieces = score_of(monkeypatch, model, method, *ids.split([2, 17, 3, 18], 1))
    assert all(float((whole[layer] - pieces[layer]).abs().max()) < 1e-5 for layer in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_turned_back_to_what_their_projection_gave(kind):
    model, ids = decoder(kind), prompt(12)
    for index, call in calls_of(model, ids).items():
        rotary = find_rotary(model, call.module)
        places = torch.arange(12)
        back = rotary.turn_back(call.query, places)
        turned = torch.stack(
            [back[:, :, place] @ rotary.mean_turn(places[place : place + 1], back.shape[3]) for place in range(12)], 2
        )
        assert float((turned - call.query).abs().max()) < 1e-4
        if kind == "llama":
            hidden = model.model(ids, output_hidden_states=True).hidden_states[index]
            layer = model.model.layers[index]
            expected = layer.self_attn.q_proj(layer.input_layernorm(hidden)).unflatten(2, (4, -1)).transpose(1, 2)
            assert float((back - expected).abs().max()) < 1e-4


def test_a_model_without_a_known_rotary_embedding_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50))
    with pytest.raises(InputError, match="reads queries as they were before they were turned"):
        tw.evict(model, tw.ExpectedAttention())
