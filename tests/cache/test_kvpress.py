"""What kvpress scores and keeps, in numbers computed with it, and what we do."""

import json
from pathlib import Path

import pytest
import torch
from golden_decoder import golden_decoder, golden_tokens

import tokenwise as tw
from tokenwise.policies.eviction import pyramid_counts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "kvpress.json").read_text(encoding="utf-8"))
CONFIG, TOKENS = GOLDEN["config"], GOLDEN["tokens"]


def method_of(name, fields):
    name = name.split(",")[0]
    return getattr(tw.cache, name)(keep=0.5, **fields)


def read(method):
    """The cache that has read the prompt."""
    model = golden_decoder(**CONFIG)
    cache = tw.evict(model, method)
    with torch.no_grad():
        model(golden_tokens(TOKENS), past_key_values=cache)
    return cache


def scores_of(method, monkeypatch):
    """The method's own scores, [key heads, tokens] of each layer."""
    found = []
    plain = type(method).score

    def score(self, tokens):
        found.append(plain(self, tokens))
        return found[-1]

    monkeypatch.setattr(type(method), "score", score)
    read(method)
    return [layer[0].expand(CONFIG["num_key_value_heads"], -1) for layer in found]


@pytest.mark.parametrize("name", GOLDEN["scores"])
def test_scores_are_theirs(name, monkeypatch):
    golden = GOLDEN["scores"][name]
    method = method_of(name, golden["fields"])
    found = scores_of(method, monkeypatch)
    assert len(found) == len(golden["scores"])
    for layer, expected in zip(found, golden["scores"], strict=True):
        expected = torch.tensor(expected).view(-1, TOKENS)
        # They raise what is kept anyway above the rest, where ours is protected apart from the score.
        free = torch.ones(expected.shape, dtype=torch.bool)
        if name != "KNorm" and not name.startswith(("LagKV", "KeyDiff")):
            free[:, : method.sink] = False
            # Their TOVA keeps the last token in any case.
            free[:, TOKENS - max(method.recent, method.window, 1) :] = False
        # What CriticalKV chooses first has the largest number there is.
        first = expected > 1e30
        assert not first.any() or layer[first].min() > layer[~first].max()
        free = free & ~first
        assert float((layer[free] - expected[free]).abs().max()) < 1e-5
        assert float(expected[free].std()) > 1e-3


def kept_by_theirs(hidden):
    """[layers, key heads, tokens], bool, from the places whose keys they hide."""
    shown = torch.ones(len(hidden), CONFIG["num_key_value_heads"] * TOKENS, dtype=torch.bool)
    for layer, places in zip(shown, hidden, strict=True):
        layer[places] = False
    return shown.view(len(hidden), -1, TOKENS)


def kept(cache):
    return torch.stack([cache.kept(layer)[0] for layer in range(len(cache.layers))])


@pytest.mark.parametrize("name", ["SnapKV", "AdaKV"])
def test_heads_that_share_a_budget_keep_what_theirs_do(name):
    golden = GOLDEN["AdaKV"]
    fields = {"allocate": "heads"} if name == "SnapKV" else {}
    cache = read(method_of(name, {**golden["fields"], **fields}))
    assert torch.equal(kept(cache), kept_by_theirs(golden["hidden"]))
    assert len(set(kept(cache).sum(2).flatten().tolist())) > 1


def test_whole_chunks_stay_as_theirs_do():
    golden = GOLDEN["ChunkKV"]
    cache = read(method_of("ChunkKV", golden["fields"]))
    assert [[head.nonzero()[:, 0].tolist() for head in layer] for layer in kept(cache)] == golden["kept"]


@pytest.mark.parametrize("case", GOLDEN["PyramidKV"])
def test_a_pyramid_has_their_steps(case):
    length, ratio, layers = (float(part) for part in case.split())
    count = round(length * (1 - ratio))
    found = pyramid_counts(count, int(length), int(layers), window=0, beta=20.0)
    assert sum(found) == count * layers
    assert max(abs(a - b) for a, b in zip(found, GOLDEN["PyramidKV"][case], strict=True)) <= 1


def test_a_repetition_scores_and_keeps_as_theirs_does(monkeypatch):
    golden = GOLDEN["KVzip"]
    method = tw.KVzip(keep=0.5, **golden["fields"])
    found = scores_of(method, monkeypatch)
    for layer, expected in zip(found, golden["scores"], strict=True):
        expected = torch.tensor(expected).view(-1, TOKENS)
        # They raise the first tokens above the others later.
        assert float((layer - expected).abs().max()) < 1e-5
    assert torch.equal(kept(read(method)), kept_by_theirs(golden["hidden"]))


def test_channels_of_keys_stay_as_theirs_do():
    golden = GOLDEN["ThinK"]
    cache = read(tw.ThinK(**golden["fields"]))
    assert [layer.notes["channels"][0].tolist() for layer in cache.layers] == golden["channels"]
