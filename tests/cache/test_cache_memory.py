"""What the cache takes, by the storage its tensors really hold: after a prompt, and at the most while it is read."""

import pytest
import torch
from small_decoders import GROUPED, prompt
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise import catalog
from tokenwise.models.tap import listen

LAYERS, TOKENS, KEEP = 8, 400, 0.25
FIELDS = {"queries": 8, "chunk": 16, "lag": 16}
NAMES = [
    entry["name"]
    for entry in catalog.entries().values()
    if entry["family"] == "cache" and entry["traits"]["mode"] == "evict" and entry["name"] != "full"
]


def held(cache):
    """Bytes of all that the layers store of keys and values, whatever part of it they use."""
    storages = {}
    for layer in cache.layers:
        for name, values in vars(layer).items():
            if isinstance(values, Tensor) and ("keys" in name or "values" in name):
                storages[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_evicted_is_freed_layer_by_layer(name):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": LAYERS})).eval()
    ids, found = prompt(TOKENS), []
    method = catalog.load_class(name, family="cache")
    fields = {field: value for field, value in FIELDS.items() if field in method.model_fields}
    with tw.evict(model, method(keep=KEEP, **fields)) as cache:
        for layer in model.model.layers:
            # All of the layer's keys and values are stored while its attention is computed.
            listen(layer.self_attn, lambda _: found.append(held(cache)))
            layer.register_forward_hook(lambda *_: found.append(held(cache)))
        model(ids, past_key_values=cache)
        full = 2 * LAYERS * 2 * 8 * TOKENS * 4
        assert cache.full_nbytes() == full
        # Rows and heads that store different numbers of tokens stand side by side, so that none fills up another.
        assert held(cache) <= 0.26 * full
        assert cache.nbytes() <= 0.26 * full
        assert len(found) >= 2 * LAYERS
        # A prompt that is read twice is stored whole until then.
        assert max(found) <= (1.1 if name == "kv_zip" else KEEP + 1 / LAYERS + 0.05) * full
        assert max(found) > (KEEP * (LAYERS - 1) + 0.5) / LAYERS * full
