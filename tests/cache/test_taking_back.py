"""The last tokens of a prompt are read once more, from what was evicted because of them."""

import pytest
import torch
from small_decoders import decoder, prompt

import tokenwise as tw


def again(model, ids, method, masked=False, steps=3):
    """The logits of the last token read again, and of tokens after it."""
    with torch.no_grad(), tw.evict(model, method, masked=masked) as cache:
        model(ids, past_key_values=cache)
        cache.take_back(1)
        assert cache.get_seq_length() == ids.shape[1] - 1
        found = [model(ids[:, -1:], past_key_values=cache).logits]
        found += [model(ids[:, step : step + 1], past_key_values=cache).logits for step in range(steps)]
        return torch.cat(found, 1), cache.kept(0).sum(2)


def test_nothing_changes_where_all_is_kept():
    model, ids = decoder(), prompt(rows=2)
    found, _ = again(model, ids, tw.KNorm(keep=1.0), steps=0)
    with torch.no_grad():
        torch.testing.assert_close(found[:, 0], model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allocate", ["evenly", "heads", "layers_and_heads"])
@pytest.mark.parametrize("method", [tw.KNorm(keep=0.4), tw.H2O(keep=0.4, recent=3), tw.SnapKV(keep=0.4, queries=4)])
def test_it_is_the_same_evicted_and_hidden(method, allocate):
    model, ids = decoder(), prompt(rows=2)
    method = method.replace(allocate=allocate)
    evicted, kept = again(model, ids, method)
    hidden, _ = again(model, ids, method, masked=True)
    torch.testing.assert_close(evicted, hidden, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert (evicted[:, 0] - model(ids).logits[:, -1]).abs().max() > 1e-2
    if allocate == "evenly" and method.interval == 1:
        # A token read again counts once: 43 seen.
        assert (kept == 17).all()


def test_a_layer_with_a_window_must_have_kept_what_is_needed():
    model, ids = decoder("gemma2"), prompt()
    with torch.no_grad(), tw.evict(model, tw.KNorm(keep=1.0)) as cache:
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        whole = model(ids, past_key_values=cache).logits[:, -1:]
        cache.take_back(1)
        torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), tw.evict(model, tw.KNorm(keep=1.0)) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.take_back(1)
