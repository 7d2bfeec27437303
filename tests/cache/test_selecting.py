"""The cache that selects: equal to hiding, whole at a full budget, rows independent, nothing lost, undone exactly."""

import gc

import pytest
import torch
from small_decoders import KINDS, decoder, difference, generate, prompt
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import tokenwise as tw
from tokenwise.cache import CacheSelector, SelectingCache
from tokenwise.errors import InputError
from tokenwise.models.tap import listen

METHODS = {
    "quest": lambda **fields: tw.Quest(**{"keep": 0.5, "page": 4, "dense_layers": 1, **fields}),
    "quest_protecting": lambda **fields: tw.Quest(**{"page": 4, "dense_layers": 0, "sink": 3, "recent": 6, **fields}),
    "mean_blocks": lambda **fields: tw.MeanBlocks(**{"keep": 0.3, "page": 4, **fields}),
    "token_select": lambda **fields: tw.TokenSelect(**{"keep": 0.5, "sink": 2, "recent": 5, **fields}),
    "token_select_amount": lambda **fields: tw.TokenSelect(
        **{"keep": "15 tokens", "sink": 2, "recent": 5, "similarity": 0.2, **fields}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_read_is_the_stock_cache_to_the_bit(kind):
    model, ids = decoder(kind), prompt()
    stock = generate(model, ids, DynamicCache(config=model.config))
    for method in (tw.Quest(keep=1.0), tw.TokenSelect(keep="1000 tokens"), tw.Quest(keep="1000 tokens")):
        with tw.evict(model, method) as cache:
            assert difference(stock, generate(model, ids, cache)) == 0
    assert difference(stock, generate(model, ids)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_selecting_equals_hiding(kind, method):
    model, ids = decoder(kind), prompt()
    stock = generate(model, ids)
    with tw.evict(model, METHODS[method]()) as cache, tw.evict(model, METHODS[method](), masked=True) as hidden:
        selected, masked = generate(model, ids, cache), generate(model, ids, hidden)
        assert difference(selected, masked) < 2e-5
        assert difference(selected, stock) > 1e-2
        assert torch.equal(selected.logits[0], stock.logits[0])
        assert all(torch.equal(cache.kept(index), hidden.kept(index)) for index in cache.places)
        # Nothing is lost: undone, it goes on as a full cache.
        cache.undo()
        ids = torch.cat([ids, prompt(1, seed=3)], 1)
        with tw.evict(model, METHODS[method]()) as again:
            model(ids[:, :40], past_key_values=again)
            again.undo()
            one = model(ids[:, 40:], past_key_values=again).logits
        assert float((one - model(ids).logits[:, -1:]).abs().max()) < 2e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_row_is_as_it_is_alone(method, implementation):
    model = decoder()
    model.set_attn_implementation(implementation)
    rows = [prompt(41), prompt(26, seed=1), prompt(9, seed=2)]
    padded = torch.stack([torch.nn.functional.pad(row[0], (41 - row.shape[1], 0)) for row in rows])
    with tw.evict(model, METHODS[method]()) as cache:
        together = generate(model, padded, cache, attention_mask=(padded != 0).long(), max_new_tokens=14)
        for place, row in enumerate(rows):
            with tw.evict(model, METHODS[method]()) as single:
                alone = generate(model, row, single, max_new_tokens=14)
                pads = 41 - row.shape[1]
                for index in cache.places:
                    read = cache.kept(index)[place]
                    assert not bool(read[:, :pads].any())
                    assert torch.equal(read[:, pads:], single.kept(index)[0])
            for one, other in zip(together.logits, alone.logits, strict=True):
                assert float((one[place] - other[0]).abs().max()) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_beams_and_several_answers_follow_their_rows(method):
    model, ids = decoder(), prompt(30, rows=2)
    method = METHODS[method]()
    with tw.evict(model, method) as cache, tw.evict(model, method, masked=True) as hidden:
        options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
        found, expected = generate(model, ids, cache, **options), generate(model, ids, hidden, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert float((found.sequences_scores - expected.sequences_scores).abs().max()) < 1e-5


def test_a_second_turn():
    model, ids = decoder(), prompt(40)
    for name, make in METHODS.items():
        with tw.evict(model, make()) as cache, tw.evict(model, make(), masked=True) as hidden:
            for which in (cache, hidden):
                model(ids, past_key_values=which)
            whole = model(torch.cat([ids, prompt(6, seed=1)], 1)).logits[:, -6:]
            one, other = (model(prompt(6, seed=1), past_key_values=which).logits for which in (cache, hidden))
            assert float((one - other).abs().max()) < 2e-5
            # Pages are for generated tokens alone.
            assert (float((one - whole).abs().max()) < 2e-5) == (not name.startswith("token_select"))
            one, other = (model(prompt(1, seed=2), past_key_values=which).logits for which in (cache, hidden))
            assert float((one - other).abs().max()) < 2e-5


def test_pages_are_those_of_the_formula():
    model, ids = decoder("qwen3"), prompt(42)
    method, seen = tw.Quest(keep=0.4, page=4, dense_layers=1), {}
    with tw.evict(model, method) as cache:
        model(ids[:, :37], past_key_values=cache)
        for step in range(37, 42):
            stops = [
                listen(layer.self_attn, lambda call, at=at: seen.update({at: (call.query.clone(), call.key.shape[2])}))
                for at, layer in enumerate(model.model.layers)
            ]
            model(ids[:, step : step + 1], past_key_values=cache)
            for stop in stops:
                stop()
            length = step + 1
            budget = max(3, int(0.4 * length + 0.5) // 4)
            assert bool(cache.kept(0).all())
            for index in (1, 2):
                query, read = seen[index][0][0, :, 0].double(), seen[index][1]
                keys = cache.layers[index].keys[0].double()
                assert read == budget * 4 - (-length % 4)
                for head in range(2):
                    bounds = []
                    for start in range(0, length, 4):
                        part = keys[head, start : start + 4]
                        low, high = part.amin(0), part.amax(0)
                        products = [
                            torch.maximum(query[2 * head + g] * low, query[2 * head + g] * high) for g in (0, 1)
                        ]
                        bounds.append(max(float(product.sum()) for product in products))
                    last = len(bounds) - 1
                    best = sorted(range(last), key=lambda page: -bounds[page])[: budget - 1]
                    expected = [place // 4 in (*best, last) for place in range(length)]
                    assert cache.kept(index)[0, head].tolist() == expected
        assert cache.stats["tokens_seen"] == 42
        assert cache.stats["tokens_read"] == (42 + 2 * read) / 3


def test_blocks_are_those_with_the_best_mean():
    model, ids = decoder(), prompt(30)
    found = {}
    with tw.evict(model, tw.MeanBlocks(keep="10 tokens", page=4)) as cache:
        model(ids, past_key_values=cache)
        stop = listen(model.model.layers[2].self_attn, lambda call: found.update(query=call.query[0, :, 0].double()))
        model(prompt(1, seed=1), past_key_values=cache)
        stop()
        keys = cache.layers[2].keys[0].double()
        for head in range(2):
            means = torch.stack([part.mean(0) for part in keys[head].split(4)])
            best = int((found["query"][2 * head : 2 * head + 2] @ means[:-1].T).amax(0).argmax())
            assert cache.kept(2)[0, head].nonzero().flatten().tolist() == [*range(4 * best, 4 * best + 4), 28, 29, 30]


def test_a_vote_is_that_of_the_formula_and_stays_while_the_query_does():
    model, ids = decoder(), prompt(60)
    queries = []
    for similarity in (None, 0.5, -1.0):
        method = tw.TokenSelect(keep="12 tokens", sink=2, recent=4, similarity=similarity)
        with tw.evict(model, method) as cache:
            model(ids[:, :30], past_key_values=cache)
            stop = listen(model.model.layers[1].self_attn, lambda call: queries.append(call.query[0, :, 0].double()))
            before, last, made = None, None, 0
            for step in range(30, 60):
                model(ids[:, step : step + 1], past_key_values=cache)
                now = queries[-1].flatten()
                if similarity is None or before is None or torch.cosine_similarity(before, now, 0) < similarity:
                    keys = cache.layers[1].keys[0].double()
                    scores = [keys[head // 2, 2 : step - 3] @ queries[-1][head] for head in range(4)]
                    vote = sum(score.softmax(0) for score in scores)
                    last = sorted(2 + place for place in vote.topk(6).indices.tolist())
                    before, made = now, made + 1
                expected = [0, 1, *last, *range(step - 3, step + 1)]
                assert cache.kept(1)[0, 0].nonzero().flatten().tolist() == expected
                assert torch.equal(cache.kept(1)[0, 0], cache.kept(1)[0, 1])
            stop()
        assert made == 30 if similarity is None else made == 1 if similarity == -1 else 1 < made < 30


def test_a_later_part_sees_its_own_tokens_and_recent_ones_before_each():
    model = decoder()
    with tw.evict(model, tw.TokenSelect(keep="12 tokens", sink=2, recent=4)) as cache:
        for seed in range(3):
            model(prompt(16, seed=seed), past_key_values=cache)
        read = cache.kept(1)[0, 0]
        assert int(read.sum()) == 12 + 15
        assert bool(read[:2].all())
        assert bool(read[48 - 16 - 3 :].all())


def test_a_pass_that_breaks_off_is_forgotten():
    model, ids = decoder(), prompt(30)
    for make in METHODS.values():
        with tw.evict(model, make()) as expected, tw.evict(model, make()) as cache:
            broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, past_key_values=cache)
            broken.remove()
            assert cache.get_seq_length() == 0
            for which in (expected, cache):
                model(ids, past_key_values=which)
            broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, :1], past_key_values=cache)
            broken.remove()
            assert cache.get_seq_length() == 30
            one, other = (model(ids[:, 5:6], past_key_values=which).logits for which in (expected, cache))
            assert torch.equal(one, other)


def test_tokens_can_be_taken_back():
    model, ids = decoder(), prompt(20)
    stock = generate(model, ids, DynamicCache(config=model.config))
    with tw.evict(model, METHODS["quest"](keep="1000 tokens")) as cache:
        assistant = decoder()
        assistant.model.layers[2].mlp.down_proj.weight.mul_(0.7)
        assert torch.equal(generate(model, ids, cache, assistant_model=assistant).sequences, stock.sequences)
    for make in METHODS.values():
        with tw.evict(model, make()) as expected, tw.evict(model, make()) as cache:
            for which in (expected, cache):
                model(ids, past_key_values=which)
            model(prompt(5, seed=3), past_key_values=cache)
            cache.crop(-5)
            one, other = (model(ids[:, :1], past_key_values=which).logits for which in (expected, cache))
            assert torch.equal(one, other)


def test_it_ends_when_it_is_undone_or_dropped():
    model, ids = decoder(), prompt()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for finish in (lambda cache: cache.undo(), lambda cache: None):
        cache = tw.evict(model, METHODS["quest"]())
        assert isinstance(cache, SelectingCache)
        model(ids, past_key_values=cache)
        finish(cache)
        del cache
        gc.collect()
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys()
        assert all(after[name][key] is value for key, value in attributes.items() if not isinstance(value, dict | bool))
        assert not after[name]["_forward_pre_hooks"]


def test_another_cache_is_none_of_its_business():
    model, ids = decoder(), prompt()
    stock = generate(model, ids)
    with tw.evict(model, METHODS["quest"]()):
        assert difference(stock, generate(model, ids)) == 0


def test_bytes_are_those_stored():
    model, ids = decoder("gemma2"), prompt(60)
    with tw.evict(model, METHODS["quest"]()) as cache:
        generate(model, ids, cache, max_new_tokens=8)
        token = 2 * 32 * 4
        assert cache.full_nbytes() == token * (7 + 2 * 67)
        assert cache.full_nbytes() < cache.nbytes() == cache.stats["bytes"]
        copied = sum(values.nbytes for values in cache._memory)
        assert cache.nbytes() <= token * (7 + 2 * (67 + 256)) + copied
        assert copied <= token * 1.125 * cache.kept(2).sum(2).max()


def test_what_cannot_work_is_refused_before_the_prompt():
    model = decoder()
    with pytest.raises(InputError, match="less than the 12 tokens that are always read"):
        tw.evict(model, tw.TokenSelect(keep="10 tokens", sink=4, recent=8))
    with pytest.raises(InputError, match="is not an amount"):
        tw.Quest(keep="2 GiB")
    windowed = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    with pytest.raises(InputError, match="no layer whose cache holds all tokens"):
        tw.evict(MistralForCausalLM(MistralConfig(**windowed, num_hidden_layers=2, sliding_window=8)), tw.Quest())
    with tw.evict(model, tw.Quest()) as cache, pytest.raises(InputError, match="Pad on the left"):
        model(prompt(8), attention_mask=torch.tensor([[1] * 6 + [0] * 2]), past_key_values=cache)


def test_bf16():
    model, ids = decoder().bfloat16(), prompt()
    for make in METHODS.values():
        with tw.evict(model, make()) as cache, tw.evict(model, make(), masked=True) as hidden:
            assert difference(generate(model, ids, cache), generate(model, ids, hidden)) < 0.3


def test_a_method_of_your_own():
    class Odd(CacheSelector):
        """Every second token, and the last."""

        def select(self, tokens, call):
            return torch.arange((tokens.seen - 1) % 2, tokens.seen, 2).expand(len(tokens.keys), 1, -1)

    model, ids = decoder(), prompt(20)
    with tw.evict(model, Odd()) as cache, tw.evict(model, Odd(), masked=True) as hidden:
        assert difference(generate(model, ids, cache), generate(model, ids, hidden)) < 2e-5


@pytest.mark.parametrize(
    "method", [tw.Quest(page=4, dense_layers=0), tw.MeanBlocks(page=16)], ids=lambda it: it.card.id
)
def test_what_fits_into_the_budget_is_read_whole_though_its_last_page_is_not_full(method):
    model, ids = decoder(), prompt(38, 2)
    ids[0, :21] = 0
    mask = (ids != 0).long()
    stock = generate(model, ids, attention_mask=mask)
    with tw.evict(model, method.replace(keep="60 tokens")) as cache:
        assert difference(generate(model, ids, cache, attention_mask=mask), stock) == 0
    with tw.evict(model, method.replace(keep="24 tokens")) as cache:
        found = generate(model, ids, cache, attention_mask=mask)
        assert float(max((a[0] - b[0]).abs().max() for a, b in zip(found.logits, stock.logits, strict=True))) < 2e-5
        assert bool(cache.kept(0)[0].sum(1).eq(22).all())
        assert difference(found, stock) > 1e-2
