"""Policies that read attention: scores as the formulas have them in fp64, budgets, chunks, cascades, noise."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from small_decoders import decoder, prompt

import tokenwise as tw
from tokenwise.cache.base import StoredTokens
from tokenwise.errors import InputError
from tokenwise.models.tap import AttentionCall
from tokenwise.signals.gumbel import exponential_noise, lane_bits

HEADS, KEY_HEADS, WIDTH = 4, 2, 6


def stored(tokens=23, pads=(0, 5), window=None, count=10, different=False, softcap=None, **fields):
    """Rows of tokens with the attention module that made them; `different`: each head stores others."""
    torch.manual_seed(0)
    batch = len(pads)
    pads = torch.tensor(pads)
    positions = torch.arange(tokens).expand(batch, 1, -1)
    seen = tokens
    if different:
        seen = 2 * tokens
        positions = torch.stack(
            [torch.randperm(seen - 1)[: tokens - 1].sort().values for _ in range(batch * KEY_HEADS)]
        )
        positions = torch.nn.functional.pad(positions, (0, 1), value=seen - 1).view(batch, KEY_HEADS, tokens)
    notes = {}
    if window is not None:
        notes["queries"] = torch.randn(batch, HEADS, window, WIDTH)
    real = positions >= pads.view(-1, 1, 1)
    return StoredTokens(
        2 * torch.randn(batch, KEY_HEADS, tokens, WIDTH),
        torch.randn(batch, KEY_HEADS, tokens, WIDTH),
        positions,
        None if bool(real.all()) else real,
        pads,
        seen,
        1,
        3,
        0.4,
        softcap,
        HEADS,
        SimpleNamespace(o_proj=torch.nn.Linear(HEADS * WIDTH, 9, bias=False)),
        {},
        notes,
        counts=[count] * batch,
        **fields,
    )


def window_attention(tokens):
    """[batch, heads, window, stored], fp64, row by row."""
    queries = tokens.notes["queries"].double()
    batch, _, window, _ = queries.shape
    found = torch.zeros(batch, HEADS, window, tokens.keys.shape[2], dtype=torch.double)
    for row in range(batch):
        for head in range(HEADS):
            own = head // (HEADS // KEY_HEADS)
            places = tokens.positions[row, own if tokens.positions.shape[1] > 1 else 0]
            for query in range(window):
                place = tokens.seen - window + query
                if place < tokens.pads[row]:
                    continue
                scores = tokens.keys[row, own].double() @ queries[row, head, query] * tokens.scaling
                if tokens.softcap:
                    scores = tokens.softcap * torch.tanh(scores / tokens.softcap)
                seen = (places <= place) & (places >= tokens.pads[row])
                found[row, head, query] = scores.masked_fill(~seen, float("-inf")).softmax(0)
    return found


def snap_kv_scores(tokens, window, kernel=5):
    """[batch, key heads, stored], fp64: what the window sees of the tokens before it, averaged over neighbours."""
    before = window_attention(tokens).mean(2).unflatten(1, (KEY_HEADS, -1)).mean(2)[..., :-window]
    smooth = torch.zeros_like(before)
    for place in range(before.shape[2]):
        start = max(place - kernel // 2, 0)
        smooth[..., place] = before[..., start : place + kernel // 2 + 1].sum(2) / kernel
    return smooth


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_snap_kv_averages_what_the_window_sees_of_the_tokens_before_it(softcap):
    tokens = stored(window=4, softcap=softcap)
    found = tw.SnapKV(queries=4).score(tokens)
    assert float((found[..., :-4] - snap_kv_scores(tokens, 4)).abs().max()) < 1e-6


def tova_scores(tokens):
    """After a pass of one query."""
    mask = None if tokens.real is None else tokens.real.unsqueeze(2)
    asked = tokens.notes["queries"], tokens.keys, tokens.values, mask, tokens.scaling
    tw.TOVA().observe(tokens, AttentionCall(torch.nn.Identity(), *asked, softcap=tokens.softcap))
    return tw.TOVA().score(tokens)


def test_tova_averages_the_last_row_over_all_heads():
    tokens = stored(window=1)
    found = tova_scores(tokens)
    assert found.shape == (2, 1, 23)
    assert float((found[:, 0] - window_attention(tokens)[:, :, 0].mean(1)).abs().max()) < 1e-6


def test_heads_that_store_different_tokens_vote_for_tokens_not_for_places():
    tokens = stored(window=1, different=True, pads=(0, 0))
    rows = window_attention(tokens)[:, :, 0].unflatten(1, (KEY_HEADS, -1)).mean(2)
    found = tova_scores(tokens)
    for row in range(2):
        votes: dict[int, float] = {}
        for head in range(KEY_HEADS):
            for place, vote in zip(tokens.positions[row, head].tolist(), rows[row, head].tolist(), strict=True):
                votes[place] = votes.get(place, 0) + vote / KEY_HEADS
        expected = torch.tensor([[votes[place] for place in head] for head in tokens.positions[row].tolist()])
        assert float((found[row] - expected).abs().max()) < 1e-6
    assert len(votes) > tokens.keys.shape[2]


def test_critical_kv_weighs_the_second_half_by_what_values_change():
    tokens = stored(window=4, count=12)
    method = tw.CriticalKV(queries=4)
    found = method.score(tokens)
    base = snap_kv_scores(tokens, 4)
    weight = tokens.module.o_proj.weight.double()
    for row in range(2):
        for head in range(KEY_HEADS):
            # Six go by the score alone, four of them to the window.
            first = set(base[row, head].masked_fill(torch.arange(19) < tokens.pads[row], -1).topk(2).indices.tolist())
            for place in range(int(tokens.pads[row]), 19):
                norms = []
                for reader in (2 * head, 2 * head + 1):
                    part = weight[:, reader * WIDTH : (reader + 1) * WIDTH]
                    norms.append(float((part @ tokens.values[row, head, place].double()).abs().sum()))
                expected = (base[row, head, place] + 1e-4) * sum(norms) / 2
                chosen = float(found[row, head, place]) > 1e30
                assert chosen == (place in first)
                assert chosen or abs(float(found[row, head, place] - expected)) < 1e-6


def test_critical_kv_wants_a_projection_with_a_plain_weight():
    model = decoder()
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="no output projection with a plain weight"):
        tw.evict(model, tw.CriticalKV(queries=8))
    tw.evict(model, tw.SnapKV(queries=8)).undo()
    tw.evict(decoder("gpt_neox"), tw.CriticalKV(queries=8)).undo()


def test_chunks_stay_whole_and_the_last_one_in_part():
    tokens = stored(tokens=37, pads=(0, 5), window=3)
    found = tw.ChunkKV(queries=3, chunk=4).score(tokens)
    base = snap_kv_scores(tokens, 3).sum(1)
    for row, pad in enumerate(tokens.pads.tolist()):
        chunks = [list(range(start, min(start + 4, 37))) for start in range(pad, 37, 4)]
        means = [
            float("inf") if chunk[-1] >= 34 else sum(float(base[row, place]) for place in chunk) / len(chunk)
            for chunk in chunks
        ]
        expected = []
        for chunk in sorted(range(len(chunks)), key=lambda chunk: -means[chunk]):
            inside = [place for place in chunks[chunk] if place < 34]
            expected += sorted(inside, key=lambda place: -float(base[row, place]))
        order = found[row, 0].argsort(descending=True).tolist()
        assert [place for place in order if pad <= place < 34] == expected
    with tw.evict(decoder(), tw.ChunkKV(keep=0.5, queries=4, chunk=4)) as cache:
        cache.model(prompt(40), past_key_values=cache)
        kept = cache.kept(0)[0, 0].view(10, 4).sum(1)
        assert kept.tolist().count(4) == 5
        assert int(kept.sum()) == 20


@pytest.mark.parametrize(("allocate", "floor"), [("evenly", 0.2), ("heads", 0.0), ("heads", 0.6)])
def test_ada_kv_counts_the_best_of_all_heads_and_shares_the_floor_evenly(allocate, floor):
    model, ids = decoder(), prompt(40)
    found = []

    class Watched(tw.AdaKV):
        def score(self, tokens):
            found.append(super().score(tokens))
            return found[-1]

    with tw.evict(model, Watched(keep=0.4, queries=4, allocate=allocate, floor=floor)) as cache:
        model(ids, past_key_values=cache)
        uneven = 0
        for layer in range(3):
            score = found[layer][0].clone()
            score[:, -4:] = float("inf")
            kept = cache.kept(layer)[0]
            assert int(kept.sum()) == 32
            if allocate == "evenly":
                expected = [set(head.topk(16).indices.tolist()) for head in score]
            else:
                best = [place // 40 for place in score.flatten().topk(32).indices.tolist()]
                first = round((1 - floor) * best.count(0) + floor * 16)
                uneven += first != best.count(0)
                expected = [
                    set(head.topk(size).indices.tolist()) for head, size in zip(score, (first, 32 - first), strict=True)
                ]
            assert [set(head.nonzero()[:, 0].tolist()) for head in kept] == expected
        assert (uneven > 0) == (floor > 0.2)
        assert tw.AdaKV().allocate == "heads"
        assert tw.AdaKV().floor == 0.2


def maps(model, ids, mask=None):
    """The attention of each layer, [batch, heads, queries, keys], fp64."""
    model.set_attn_implementation("eager")
    found = model(ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [layer.double() for layer in found]


class Scores:
    """What a method gives as scores while it is watched."""

    def __init__(self, monkeypatch, method):
        self.found = []
        plain = method.score

        def score(owner, tokens):
            self.found.append(plain(owner, tokens))
            return self.found[-1]

        monkeypatch.setattr(method, "score", score)


@pytest.mark.parametrize("pieces", [32, 9])
def test_observed_attention_is_the_mean_over_the_queries_that_see_a_token(monkeypatch, pieces):
    model, ids = decoder(), prompt(32, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    scores = Scores(monkeypatch, tw.ObservedAttention)
    with tw.evict(model, tw.ObservedAttention()) as cache, cache.held():
        for start in range(0, 32, pieces):
            part = ids[:, start : start + pieces]
            model(part, attention_mask=mask[:, : start + pieces], past_key_values=cache)
    for found, whole in zip(scores.found, maps(model, ids, mask), strict=True):
        for row, pad in enumerate((0, 6)):
            columns = whole[row, :, pad:, pad:].sum(1) / torch.arange(32 - pad, 0, -1)
            expected = columns.unflatten(0, (2, 2)).mean(1)
            assert float((found[row, :, pad:] - expected).abs().max()) < 1e-5


def test_spatten_adds_up_over_heads_queries_and_layers_and_later_layers_keep_a_part(monkeypatch):
    model, ids = decoder(), prompt(40, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    scores = Scores(monkeypatch, tw.SpAttenCache)
    with tw.evict(model, tw.SpAttenCache(keep=0.4)) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
        kept = [cache.kept(layer)[:, 0] for layer in range(3)]
        counts = torch.stack(kept).sum(2)
        assert counts.sum(0).tolist() == [3 * 16, 3 * 13]
        assert counts.tolist() == [[31, 25], [16, 13], [1, 1]]
        total = torch.zeros(2, 40, dtype=torch.double)
        for layer, whole in enumerate(maps(model, ids, mask)):
            total[0] += whole[0].sum((0, 1))
            total[1, 7:] += whole[1, :, 7:, 7:].sum((0, 1))
            alive = scores.found[layer][:, 0] > float("-inf")
            assert layer == 0 or torch.equal(alive, kept[layer - 1])
            assert float((scores.found[layer][:, 0] - total)[alive].abs().max()) < 1e-4
        for step in range(12):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(prompt(1, rows=2, seed=step), attention_mask=mask, past_key_values=cache)
            kept = [cache.kept(layer) for layer in range(3)]
            assert all(not bool((later & ~before).any()) for before, later in itertools.pairwise(kept))
            assert all(torch.equal(heads[:, 0], heads[:, 1]) for heads in kept)


BUDGETED = {
    "h2o": lambda **fields: tw.H2O(**fields),
    "keyformer": lambda **fields: tw.Keyformer(**fields),
    "critical_kv": lambda **fields: tw.CriticalKV(queries=8, **fields),
    "chunk_kv": lambda **fields: tw.ChunkKV(queries=8, chunk=4, **fields),
    "sp_atten_cache": lambda **fields: tw.SpAttenCache(**fields),
}


@pytest.mark.parametrize("method", BUDGETED)
def test_scores_and_protection_that_depend_on_the_budget_follow_it(method):
    model, ids = decoder(), prompt(40, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with tw.evict(model, BUDGETED[method](keep=1.0), masked=True) as whole:
        model(ids[:, :39], attention_mask=mask[:, :39], past_key_values=whole)
        for keep in (0.3, 0.7):
            with tw.evict(model, BUDGETED[method](keep=keep)) as cache:
                model(ids[:, :39], attention_mask=mask[:, :39], past_key_values=cache)
                hidden = whole.with_keep(keep)
                assert all(torch.equal(cache.kept(layer), hidden.kept(layer)) for layer in range(3))


@pytest.mark.parametrize(
    ("method", "count", "last"), [("H2O", 10, 5), ("H2O", 1, 0), ("Keyformer", 60, 18), ("Keyformer", 100, 30)]
)
def test_the_last_tokens_get_their_share_of_the_budget(method, count, last):
    method = getattr(tw, method)()
    assert method.last(count) == last
    assert method.replace(recent=7).last(count) == max(last, 7)
    assert method.replace(sink=1).last(101) == int(100 * method.recent_share)


def test_every_layer_of_a_pyramid_keeps_what_is_protected():
    with tw.evict(decoder(), tw.H2O(keep=0.3, sink=2, recent=4, recent_share=0, allocate="pyramid")) as cache:
        cache.model(prompt(40), past_key_values=cache)
        kept = torch.stack([cache.kept(layer) for layer in range(3)])
        assert int(kept.sum()) == 3 * 2 * 12
        assert bool(kept[..., :2].all())
        assert bool(kept[..., -4:].all())


def attention_call(tokens, queries, softcap=None):
    key, value = tokens.keys, tokens.values
    batch, _, keys, _ = key.shape
    query = torch.randn(batch, HEADS, queries, WIDTH)
    places = torch.arange(tokens.seen - queries, tokens.seen).unsqueeze(1)
    columns = torch.arange(keys)
    mask = (columns <= places) & (columns >= tokens.pads.view(-1, 1, 1, 1))
    # A query of padding sees something, as models have it.
    mask = mask | ~mask.any(3, keepdim=True)
    return AttentionCall(torch.nn.Identity(), query, key, value, mask, tokens.scaling, softcap=softcap)


def noisy_columns(tokens, call, temperature, seed):
    """[batch, key heads, keys], fp64, from whole maps with noise of a row's own positions."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    found = torch.zeros(len(tokens.pads), KEY_HEADS, keys, dtype=torch.double)
    for row, pad in enumerate(tokens.pads.tolist()):
        for head in range(HEADS):
            scores = call.query[row, head].double() @ call.key[row, head // 2].double().T * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            if seed is not None:
                places = torch.arange(tokens.seen - queries, tokens.seen).unsqueeze(1) - pad
                lane = torch.tensor(tokens.layer * HEADS + head)
                scores = scores - exponential_noise(lane_bits(seed, lane), places, torch.arange(keys) - pad).log()
            scores = scores.masked_fill(~call.mask[row, 0], float("-inf")) / temperature
            real = torch.arange(tokens.seen - queries, tokens.seen) >= pad
            found[row, head // 2] += scores.softmax(1)[real].sum(0)
    return found


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_keyformer_reads_attention_with_noise_and_a_rising_temperature(seed, softcap):
    method = tw.Keyformer(tau_steps=4, **({"gumbel": False} if seed is None else {"seed": seed}))
    tokens = stored(tokens=300)
    tokens.notes["shown"] = torch.arange(300) >= tokens.pads.unsqueeze(1)
    call = attention_call(tokens, 300, softcap)
    method.observe(tokens, call)
    expected = noisy_columns(tokens, call, 1.0, seed)
    assert float((method.score(tokens) - expected).abs().max()) < 1e-4
    assert torch.allclose(method.score(tokens).sum(2), torch.tensor([[600.0], [590.0]]).expand(2, 2))
    for temperature in (1.25, 1.5, 1.75, 2.0, 2.0):
        tokens.notes.pop("shown", None)
        call = attention_call(tokens, 1, softcap)
        method.observe(tokens, call)
        expected += noisy_columns(tokens, call, temperature, seed)
        assert float((method.score(tokens) - expected).abs().max()) < 1e-4


def test_keyformer_without_noise_at_temperature_one_is_h2o():
    model, ids = decoder(), prompt(40)
    fields = {"keep": 0.4, "recent_share": 0.3}
    one = tw.Keyformer(**fields, gumbel=False, tau_end=1.0)
    with tw.evict(model, one) as cache, tw.evict(model, tw.H2O(**fields)) as other:
        for which in (cache, other):
            model.generate(ids, past_key_values=which, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for index in range(3):
            assert torch.equal(cache.layers[index].tracks["received"], other.layers[index].tracks["received"])
            assert torch.equal(cache.kept(index), other.kept(index))


def test_keyformer_keeps_others_with_another_seed_and_the_same_with_the_same():
    model, ids = decoder(), prompt(40)

    def kept(rows=1, **fields):
        with tw.evict(model, tw.Keyformer(keep=0.4, **fields)) as cache:
            model(ids.expand(rows, -1), past_key_values=cache)
            return torch.stack([cache.kept(index) for index in range(3)])

    assert torch.equal(kept().expand(-1, 3, -1, -1), kept(rows=3))
    assert torch.equal(kept(), kept(seed=0))
    assert not torch.equal(kept(), kept(seed=1))
    assert not torch.equal(kept(), kept(gumbel=False))


def test_a_window_reaches_back_over_what_has_been_read_alone(monkeypatch):
    model, ids = decoder(), prompt(30)
    seen = []
    plain = StoredTokens.window_rows
    monkeypatch.setattr(StoredTokens, "window_rows", lambda self: seen.append(plain(self)) or seen[-1])
    with tw.evict(model, tw.SnapKV(keep=0.8, queries=8)) as cache:
        for part in ids.split([20, 3, 1, 1, 5], 1):
            model(part, past_key_values=cache)
            # Of eight queries, where three follow twenty; of five, behind two that were generated.
        assert [rows.shape[3] for rows in seen[::3]] == [8, 8, 5]
        positions = cache.layers[0].positions
        assert positions.shape[2] == 24


@pytest.mark.parametrize("method", ["SnapKV", "AdaKV"])
def test_a_second_turn_is_scored_by_its_own_queries(method):
    model, ids = decoder(), prompt(30)
    method = getattr(tw, method)(keep=0.9, queries=8)
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        for part in ids.split([20, 1, 1, 8], 1):
            one, other = (model(part, past_key_values=which).logits for which in (cache, hidden))
            assert float((one - other).abs().max()) < 2e-5
        assert all(torch.equal(cache.kept(index), hidden.kept(index)) for index in range(3))


@pytest.mark.parametrize("name", ["TOVA", "ObservedAttention", "CriticalKV", "ChunkKV", "Keyformer", "SpAttenCache"])
def test_bf16_is_scored_in_more(name):
    model, ids = decoder().bfloat16(), prompt(40, rows=2)
    fields = {"queries": 8} if name in ("CriticalKV", "ChunkKV") else {}
    found = []
    method = getattr(tw, name)(keep=0.5, **fields)
    with tw.evict(model, method) as cache:
        plain = cache._scores
        cache._scores = lambda *given: found.append(plain(*given)) or found[-1]
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert all(scores.dtype == torch.float32 for scores in found)
        # Ties, which bfloat16 would give in numbers, are rare.
        free = found[0][0, 0][found[0][0, 0] < 1e30]
        assert len(free.unique()) > 0.9 * len(free) > 0
        assert cache.layers[0].keys.dtype == torch.bfloat16
