"""LagKV and KeyDiff against their formulas, with heads that store different tokens."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import tokenwise as tw
from tokenwise.cache.base import StoredTokens


def stored(real=None, tokens=40, rows=2, heads=3, width=8):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(rows, heads, tokens, width, generator=generator) for _ in range(2))
    positions = torch.arange(tokens).expand(rows, heads, -1)
    pads = torch.zeros(rows, dtype=torch.long)
    return StoredTokens(keys, values, positions, real, pads, tokens, 0, 1, 0.35, None, heads, None, {}, {})


def some_real():
    """Heads with 40, 31 and 19 tokens; what does not count stands in front, and once among the others."""
    real = torch.arange(40) >= torch.tensor([0, 9, 20]).view(1, 3, 1)
    real = real.expand(2, -1, -1).clone()
    real[1, 2, 25] = False
    return real


def lag_reference(keys, values, sink, lag):
    """[tokens], fp64, of one head."""
    count = len(keys)
    if count < sink + 2 * lag:
        return torch.tensor([1.0] * min(sink, count) + [place / (count - sink) for place in range(count - sink)])
    scores = torch.ones(count)
    blocks = (count - sink) // lag
    for block in range(blocks - 1):
        here = slice(sink + block * lag, sink + (block + 1) * lag)
        following = slice(here.stop, here.stop + lag)
        both = 0
        for states in (keys.double(), values.double()):
            least, most = states[following].min(0).values, states[following].max(0).values
            both = both + ((states[here] - least) / (most - least)).std(1).softmax(0)
        for place, rank in enumerate(both.argsort().argsort().tolist()):
            scores[here.start + place] = rank / lag
    return scores


@pytest.mark.parametrize("lag", [2, 6, 9, 30])
@pytest.mark.parametrize("real", [None, some_real()], ids=["all", "some"])
def test_blocks_are_ranked_on_the_scale_of_the_next(lag, real):
    tokens = stored(real)
    found = tw.LagKV(lag=lag, sink=3).score(tokens)
    for row in range(2):
        for head in range(3):
            counts = torch.ones(40, dtype=torch.bool) if real is None else real[row, head]
            expected = lag_reference(tokens.keys[row, head, counts], tokens.values[row, head, counts], 3, lag)
            assert float((found[row, head, counts] - expected).abs().max()) < 1e-6


def test_channels_that_do_not_vary_give_no_nan():
    tokens = stored()
    tokens.keys[:] = 1.0
    assert bool(tw.LagKV(lag=6).score(tokens).isfinite().all())


@pytest.mark.parametrize("real", [None, some_real()], ids=["all", "some"])
def test_keys_unlike_the_mean_direction_score_high(real):
    tokens = stored(real)
    found = tw.KeyDiff().score(tokens)
    for row in range(2):
        for head in range(3):
            counts = torch.ones(40, dtype=torch.bool) if real is None else real[row, head]
            keys = tokens.keys[row, head, counts].double()
            expected = -cosine_similarity(keys, normalize(keys, dim=1).mean(0, keepdim=True), dim=1)
            assert float((found[row, head, counts] - expected).abs().max()) < 1e-6
