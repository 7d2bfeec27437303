"""The layer with two tiers: what stands where, with as many exact tokens in each head or not."""

import pytest
import torch

from tokenwise.models.selective_kv import SelectiveLayer
from tokenwise.models.tiered_kv import TieredLayer


def layer(tokens=12):
    made = SelectiveLayer()
    generator = torch.Generator().manual_seed(0)
    made.update(*torch.randn(2, 2, 3, tokens, 4, generator=generator))
    made.tracks["weight"] = torch.rand(2, 3, tokens, generator=generator)
    return made


@pytest.mark.parametrize("even", [True, False])
def test_all_come_back_in_their_order(even):
    plain = layer()
    if even:
        exact = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(1)).argsort(2) < 5
    else:
        exact = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    tiered = TieredLayer.of(plain, exact, 8)
    assert (tiered.real is None) == even
    counted = torch.ones_like(tiered.is_exact()) if even else tiered.real
    assert torch.equal((tiered.is_exact() & counted).sum(2), exact.sum(2))
    whole = tiered.whole()
    assert torch.equal(whole.positions, plain.positions.expand(2, 3, -1))
    assert whole.real is None
    assert torch.equal(whole.tracks["weight"], plain.tracks["weight"])
    for one, other in ((whole.keys, plain.keys), (whole.values, plain.values)):
        assert torch.equal(one[exact], other[exact])
        assert 0 < float((one - other).abs().max()) < 0.02
    assert tiered.nbytes() < plain.nbytes() or not even


def test_new_tokens_are_exact_and_can_be_taken_back():
    plain = layer()
    exact = (torch.arange(12) >= 8).view(1, 1, -1)
    tiered = TieredLayer.of(plain, exact, 4)
    before = tiered.whole().keys
    new = torch.randn(2, 2, 3, 2, 4)
    keys, values = tiered.update(*new)
    assert tiered.gave(keys)
    assert torch.equal(keys[:, :, -2:], new[0])
    assert torch.equal(values[:, :, -2:], new[1])
    assert tiered.seen == 14
    assert int(tiered.is_exact()[0, 0].sum()) == 6
    assert tiered.mean_stored() == 14
    tiered.release()
    assert tiered.keys is None
    tiered.take_back(12)
    assert tiered.seen == 12
    assert torch.allclose(tiered.whole().keys, before, atol=1e-5)
    assert "exact" not in tiered.tracks
