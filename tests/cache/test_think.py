"""Keys with fewer channels: memory that is freed, equal to channels that are zero, beside any choice of tokens."""

import pytest
import torch
from small_decoders import KINDS, decoder, prompt
from transformers import DynamicCache

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.models.decoders import cached_attentions
from tokenwise.models.tap import listen


def without(call, kept):
    """Set the channels of the keys that are not `kept` to zero."""
    shown = torch.zeros_like(call.key[:, :, :1], dtype=torch.bool).scatter_(3, kept.unsqueeze(2), True)
    call.key = call.key * shown


def test_memory_of_the_channels_is_freed():
    model, ids = decoder(), prompt(40)
    with tw.evict(model, tw.ThinK(channels=0.5)) as cache:
        model(ids, past_key_values=cache)
        token = 3 * 2 * 8 * 4
        assert cache.nbytes() == cache.stats["bytes"] == 40 * token * 3 / 2
        assert cache.stats["full_bytes"] == 40 * token * 2
        assert cache.stats["tokens_stored"] == 40
        model(ids[:, :1], past_key_values=cache)
        # With room for one token more.
        assert cache.nbytes() == 42 * token * 3 / 2
    with tw.evict(model, tw.ThinK(channels=0.5, keep=0.25, allocate="heads")) as cache:
        model(ids, past_key_values=cache)
        assert cache.nbytes() == 32 * token * 3 / 2  # the 32 tokens at the end stay
        assert cache.stats["full_bytes"] == 40 * token * 2


def test_all_channels_are_the_full_cache():
    model, ids = decoder(), prompt(40)
    with tw.evict(model, tw.ThinK(channels=1.0)) as cache:
        found = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_channels_equal_channels_of_zeros(kind):
    model, ids = decoder(kind), prompt(50)
    with tw.evict(model, tw.ThinK(queries=8)) as cache:
        model(ids[:, :40], past_key_values=cache)
        found = torch.cat([model(part, past_key_values=cache).logits for part in ids[:, 40:].split([1, 9], 1)], 1)
        channels = {index: cache.layers[index].notes["channels"] for index in cache._places}
        assert len(channels) >= 2
    stops, stock = [], DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=stock)
    for index, module in cached_attentions(model).items():
        if index in channels:
            stops.append(listen(module, lambda call, kept=channels[index]: without(call, kept)))
    expected = torch.cat([model(part, past_key_values=stock).logits for part in ids[:, 40:].split([1, 9], 1)], 1)
    for stop in stops:
        stop()
    assert float((found - expected).abs().max()) < 2e-5
    with tw.evict(model, tw.ThinK(queries=8, keep=1.0), masked=True) as cache:
        model(ids[:, :40], past_key_values=cache)
        expected = torch.cat([model(part, past_key_values=cache).logits for part in ids[:, 40:].split([1, 9], 1)], 1)
    assert float((found - expected).abs().max()) < 2e-5
    assert float((found - model(ids).logits[:, 40:]).abs().max()) > 1e-2


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(InputError, match="positions"):
        tw.ThinK(positions="compact")
