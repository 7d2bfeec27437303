"""Tokens that the user protects: they stay in every layer and head, within the budget, beside sink and recent ones."""

import pytest
import torch
from small_decoders import decoder, difference, generate, prompt

import tokenwise as tw
from tokenwise.errors import InputError

METHODS = [
    tw.SnapKV(keep=0.5, queries=4, sink=2),
    tw.AdaKV(keep=0.5, queries=4),
    tw.PyramidKV(keep=0.5, queries=4),
    tw.ChunkKV(keep=0.5, queries=4, chunk=5),
    tw.CriticalKV(keep=0.5, queries=4),
    tw.H2O(keep=0.5),
    tw.TOVA(keep=0.5),
    tw.StreamingLLM(keep=0.5),
    tw.SpAttenCache(keep=0.5),
    tw.KVzip(keep=0.5),
    tw.LagKV(keep=0.5, lag=6),
    tw.KNorm(keep=0.5, allocate="layers_and_heads"),
    tw.cache.Random(keep=0.5, positions="compact", interval=3),
]


def named(method):
    return method.card.id


def padded():
    """Two rows, one of them padded, and which of their tokens are to stay: others in each row."""
    ids = prompt(40, 2)
    ids[0, :9] = 0
    protect = torch.zeros(2, 40, dtype=torch.bool)
    protect[0, 5:16] = True
    protect[1, [3, 17, 18, 30]] = True
    return ids, (ids != 0).long(), protect


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_protected_tokens_stay_within_the_budget_and_rows_are_independent(method):
    model, (ids, mask, protect) = decoder(), padded()
    with (
        tw.evict(model, method, protect=protect) as cache,
        tw.evict(model, method, masked=True, protect=protect) as all_,
    ):
        found, hidden = (generate(model, ids, each, attention_mask=mask) for each in (cache, all_))
    assert difference(found, hidden) < 2e-5
    for index in cache.places:
        kept = cache.kept(index)[..., :40]
        assert bool(kept[(protect & mask.bool()).unsqueeze(1).expand_as(kept)].all())
    with torch.no_grad(), tw.evict(model, method, protect=protect) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
        assert torch.stack([cache.kept(index).sum(2) for index in cache.places]).sum((0, 2)).tolist() == [96, 120]
    if isinstance(method, tw.cache.Random):
        return
    for row in (0, 1):
        real = mask[row].bool()
        with tw.evict(model, method, protect=protect[row, real]) as cache:
            alone = generate(model, ids[row : row + 1, real], cache)
        logits = zip(found.logits, alone.logits, strict=True)
        assert max(float((both[row] - one[0]).abs().max()) for both, one in logits) < 2e-5


def test_more_protected_tokens_than_a_share_would_keep_all_stay():
    model, protect = decoder(), torch.arange(40) < 30
    with torch.no_grad(), tw.evict(model, tw.KNorm(keep=0.25, recent=4), protect=protect) as cache:
        model(prompt(40), past_key_values=cache)
        kept = cache.kept(0)
    assert torch.equal(kept[0, 0], protect | (torch.arange(40) >= 36))


def test_beams_and_turns_and_copies_keep_them():
    model, (ids, mask, protect) = decoder(), padded()
    method = tw.SnapKV(keep=0.5, queries=4, bits=8)
    with tw.evict(model, method, protect=protect) as cache:
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, num_beams=3, do_sample=False)
        kept = cache.kept(1)[..., :40]
        assert bool(kept[(protect & mask.bool()).repeat_interleave(3, 0).unsqueeze(1).expand_as(kept)].all())
    with torch.no_grad(), tw.evict(model, method, protect=protect[1]) as cache:
        for seed in (1, 2):
            model(prompt(40, seed=seed), past_key_values=cache)
        assert cache.kept(2)[:, :, :40][..., protect[1]].all()
        cache.reset()
        model(prompt(40, seed=3), past_key_values=cache)
        assert cache.kept(2)[..., protect[1]].all()


def test_many_budgets_from_one_prompt_protect_them():
    model, protect = decoder(), torch.arange(40) % 8 == 3
    full = tw.SnapKV(keep=1.0, queries=4)
    with torch.no_grad(), tw.evict(model, full, masked=True, protect=protect) as cache:
        model(prompt(40), past_key_values=cache)
        with cache.with_keep(0.3) as other, tw.evict(model, full.replace(keep=0.3), protect=protect) as evicted:
            model(prompt(40), past_key_values=evicted)
            assert torch.equal(other.kept(1), evicted.kept(1))
            assert other.kept(1)[..., protect].all()


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        (torch.ones(40), "float32"),
        (torch.ones(1, 1, 40, dtype=torch.bool), "shape"),
        ([True] * 40, "protect"),
        (torch.ones(3, 40, dtype=torch.bool), "3 rows, and the batch 2"),
        (torch.arange(40) < 13, "less than the 17 tokens"),
    ],
)
def test_masks_that_do_not_fit_are_refused(protect, message):
    model = decoder()
    with pytest.raises(InputError, match=message):
        generate(model, prompt(40, 2), tw.evict(model, tw.SnapKV(keep="16 tokens", queries=4), protect=protect))


def test_a_selector_takes_no_mask():
    with pytest.raises(InputError, match="stores all tokens"):
        tw.evict(decoder(), tw.Quest(), protect=torch.ones(40, dtype=torch.bool))
