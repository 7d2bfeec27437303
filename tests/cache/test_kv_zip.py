"""What is repeated, that it is forgotten again, and that a model which cannot repeat is refused."""

import pytest
import torch
from small_decoders import decoder, prompt

import tokenwise as tw
from tokenwise.errors import InputError


def test_what_is_repeated():
    ids = torch.arange(10, 32).view(1, -1).repeat(2, 1)
    real = torch.arange(22) < torch.tensor([[22], [9]])
    method = tw.KVzip(chunk=10, instruction=[1, 2], continuation=[3], suffix=[4])
    passes = [(more.tolist(), repeats.tolist()) for more, repeats in method.repetitions(ids, real)]
    assert len(passes) == 3
    assert passes[0] == ([[1, 2, 4, *range(10, 20)]] * 2, [[-1] * 3 + [*range(10)], [-1] * 3 + [*range(9), -2]])
    assert passes[1][0] == [[3, *range(12, 20), 4, *range(20, 30)]] * 2
    assert passes[1][1] == [[-1] * 10 + [*range(10, 20)], [-1] * 10 + [-2] * 10]
    assert passes[2][0] == [[3, *range(22, 30), 4, 30, 31]] * 2
    plain = [more.tolist() for more, _ in tw.KVzip(chunk=15).repetitions(ids, real)]
    assert plain == [[[*range(10, 25)]] * 2, [[*range(25, 32)]] * 2]


def reference(model, ids, keep, sink=4):
    """Which tokens stay, [layers, heads, tokens], from whole maps of a prompt read twice in one piece."""
    count = ids.shape[1]
    model.set_attn_implementation("eager")
    # The whole model sees its prompt and the repetition; the score looks at the same columns.
    maps = model(torch.cat([ids, ids], 1), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    scores = torch.stack([each[0, :, count:, :count].amax(1).unflatten(0, (2, -1)).amax(1) for each in maps])
    scores[..., :sink] = float("inf")
    best = scores.flatten().argsort(descending=True, stable=True)[: int(keep * scores.numel())]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, best, True).view(scores.shape)


def test_it_keeps_what_whole_maps_of_a_second_reading_say():
    model, ids = decoder(), prompt(40)
    expected = reference(model, ids, 0.3)
    with tw.evict(model, tw.KVzip(keep=0.3)) as cache:
        model(ids, past_key_values=cache)
        found = torch.stack([cache.kept(layer)[0] for layer in range(3)])
        assert torch.equal(found, expected)
        assert cache.stats["bytes"] == cache.nbytes() == int(found.sum()) * 2 * 8 * 4
        assert cache.stats["tokens_stored"] == pytest.approx(12)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("allocate", ["evenly", "layers_and_heads"])
def test_the_repetition_is_forgotten(kind, allocate):
    model, ids = decoder(kind), prompt(40)
    with tw.evict(model, tw.KVzip(keep=0.999, chunk=16, allocate=allocate)) as cache:
        model(ids[:, :39], past_key_values=cache)
        assert cache.get_seq_length() == 39
        found = model(ids[:, 39:], past_key_values=cache).logits
    assert float((found - model(ids).logits[:, 39:]).abs().max()) < 1e-4


@pytest.mark.parametrize("allocate", ["evenly", "layers_and_heads"])
def test_a_second_turn_repeats_what_is_new(allocate, monkeypatch):
    model, ids = decoder(), prompt(60)
    repeated = []
    plain = tw.KVzip.repetitions
    monkeypatch.setattr(
        tw.KVzip, "repetitions", lambda self, ids, real: repeated.append(ids.tolist()) or plain(self, ids, real)
    )
    with tw.evict(model, tw.KVzip(keep=0.5, allocate=allocate)) as cache:
        model(ids[:, :40], past_key_values=cache)
        before = torch.stack([cache.kept(layer)[0] for layer in range(3)])
        for step in range(40, 43):
            model(ids[:, step : step + 1], past_key_values=cache)
        model(ids[:, 43:], past_key_values=cache)
        after = torch.stack([cache.kept(layer)[0] for layer in range(3)])
    assert repeated == [ids[:, :40].tolist(), ids[:, 40:].tolist()]
    assert int(after.sum()) == 30 * 6
    assert not bool((after[..., :40] & ~before).any())
    assert bool(after[..., 40:].any())


def test_a_repetition_that_breaks_off_leaves_the_prompt():
    model, ids = decoder("gemma2"), prompt(40)
    with tw.evict(model, tw.KVzip(keep=0.5)) as cache:
        calls = []
        broken = model.model.layers[2].mlp.register_forward_pre_hook(
            lambda *args: calls.append(1) or (len(calls) == 2 and 1 / 0) or None
        )
        with pytest.raises(ZeroDivisionError):
            model(ids, past_key_values=cache)
        broken.remove()
        found = model(ids[:, :1], past_key_values=cache).logits
        assert cache.get_seq_length() == 41
    expected = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    assert float((found - expected).abs().max()) < 1e-4


def test_without_ids_there_is_nothing_to_repeat():
    model, ids = decoder(), prompt(20)
    with (
        tw.evict(model, tw.KVzip()) as cache,
        pytest.raises(InputError, match="needs the tokens' ids"),
    ):
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert cache.get_seq_length() == 0
