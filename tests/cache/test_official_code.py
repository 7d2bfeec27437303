"""What the code of the methods' authors keeps, reads and answers, in numbers computed with it, and what we do."""

import json
from pathlib import Path

import pytest
import torch
from golden_decoder import golden_decoder, golden_tokens
from torch.testing import assert_close

import tokenwise as tw

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "cache_official.json").read_text(encoding="utf-8"))
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def model_of(golden, **sizes):
    sizes = {"heads": golden.get("heads"), "layers": golden.get("layers"), **sizes}
    return golden_decoder(**GOLDEN["config"], num_key_value_heads=sizes["heads"], num_hidden_layers=sizes["layers"])


def kept(cache):
    """[layers][heads][tokens], the tokens' positions."""
    return [[head.nonzero()[:, 0].tolist() for head in cache.kept(layer)[0]] for layer in range(len(cache.layers))]


def steps(golden, method, pieces=None):
    """The cache, and the logits of the last token, after the prompt and each token that follows."""
    pieces = pieces or [golden["tokens"]] + [1] * golden["steps"]
    model = model_of(golden)
    with tw.evict(model, method) as cache:
        for piece in golden_tokens(sum(pieces)).split(pieces, 1):
            logits = model(piece, past_key_values=cache).logits[0, -1]
            yield cache, logits


def kept_of_a_prompt(golden, method, tokens, heads):
    model = model_of(golden, heads=heads)
    with tw.evict(model, method) as cache:
        model(golden_tokens(tokens), past_key_values=cache)
        return kept(cache)


def test_h2o_scores_keeps_and_answers_as_theirs_does():
    golden = GOLDEN["H2O"]
    count = golden["heavy"] + golden["recent"]
    method = tw.H2O(keep=f"{count} tokens", recent_share=golden["recent"] / count)
    for step, (cache, logits) in enumerate(steps(golden, method)):
        assert kept(cache) == golden["kept"][step]
        assert_close(logits, torch.tensor(golden["logits"][step]), **NEAR)
        if step in (0, golden["steps"]):
            for layer, expected in zip(cache.layers, golden["scores"][step > 0], strict=True):
                # A token that is generated takes the place of the one that goes.
                order = layer.positions.argsort(dim=2)
                found = layer.tracks["received"].gather(2, order)[0]
                assert_close(found, torch.tensor(expected), **NEAR)


def test_tova_keeps_and_answers_as_theirs_does():
    golden = GOLDEN["TOVA"]
    method = tw.TOVA(keep=f"{golden['size']} tokens")
    gone = 0
    for step, (cache, logits) in enumerate(steps(golden, method)):
        expected = golden["kept"][step]
        assert kept(cache) == [[layer, layer] for layer in expected]
        assert_close(logits, torch.tensor(golden["logits"][step]), **NEAR)
        gone += sum(golden["tokens"] + step - 1 not in layer for layer in expected)
    # Theirs lets the last token itself go, too.
    assert gone > 0


def test_streaming_llm_answers_as_theirs_does():
    golden = GOLDEN["StreamingLLM"]
    method = tw.StreamingLLM(keep=f"{golden['start'] + golden['recent']} tokens", sink=golden["start"])
    for step, (_, logits) in enumerate(steps(golden, method)):
        assert_close(logits, torch.tensor(golden["logits"][step]), **NEAR)


def test_snap_kv_keeps_what_theirs_does():
    golden = GOLDEN["SnapKV"]
    method = tw.SnapKV(keep=f"{golden['count']} tokens", queries=golden["window"])
    assert kept_of_a_prompt(golden, method, golden["tokens"], golden["heads"]) == golden["kept"]


@pytest.mark.parametrize("case", GOLDEN["PyramidKV"]["cases"], ids=str)
def test_a_pyramid_keeps_what_theirs_does_where_its_steps_are_whole(case):
    golden, count = GOLDEN["PyramidKV"], case["count"]
    method = tw.PyramidKV(keep=f"{count} tokens", queries=case["window"])
    found = kept_of_a_prompt(golden, method, case["tokens"], case["heads"])
    sizes, theirs = ([len(layer[0]) for layer in layers] for layers in (found, case["kept"]))
    assert sum(sizes) == golden["layers"] * count
    if case["tokens"] < 2 * (count - case["window"]):
        # Theirs is even where a prompt is shorter than twice the budget.
        assert theirs == [count] * golden["layers"]
        assert sizes[0] > sizes[1] == count > sizes[2]
    elif count == 25:
        # Theirs rounds down: a twentieth of 17 is nothing.
        assert max(abs(one - other) for one, other in zip(sizes, theirs, strict=True)) == 1
    else:
        assert found == case["kept"]


@pytest.mark.parametrize("case", GOLDEN["AdaKV"]["cases"], ids=str)
def test_ada_kv_keeps_what_theirs_does(case):
    golden = GOLDEN["AdaKV"]
    method = tw.AdaKV(keep=f"{case['count']} tokens", queries=golden["window"], floor=case["floor"])
    found = kept_of_a_prompt(golden, method, golden["tokens"], case["heads"])
    for layer, expected in zip(found, case["kept"], strict=True):
        total, theirs = (sum(len(head) for head in heads) for heads in (layer, expected))
        assert total == case["heads"] * case["count"]
        if theirs == total:
            assert layer == expected
        else:
            # Theirs rounds each head's share by itself.
            sizes = [len(one) - len(other) for one, other in zip(layer, expected, strict=True)]
            assert sorted(sizes) == [-1, 0, 0, 0]


@pytest.mark.parametrize("case", GOLDEN["Keyformer"]["cases"], ids=lambda case: f"{case['seed']} {case['share']}")
def test_keyformer_scores_and_keeps_as_theirs_does(case):
    golden = {**GOLDEN["Keyformer"], "tokens": case["tokens"], "steps": case["steps"]}
    noise = {"gumbel": case["seed"] is not None, "seed": case["seed"] or 0}
    if "scores" in case:
        # Nothing has to go yet: scores add up while the temperature rises.
        for step, (cache, _) in enumerate(steps(golden, tw.Keyformer(keep="100 tokens", **noise))):
            if step in (0, case["steps"]):
                for layer, expected in zip(cache.layers, case["scores"][step > 0], strict=True):
                    assert_close(layer.tracks["received"][0], torch.tensor(expected), **NEAR)
        return
    method = tw.Keyformer(keep=case["share"] / 100, **noise)
    recent, best = case["counts"]
    # Theirs counts the next token among the last and drops the first of these, which ours keeps.
    first = case["tokens"] - recent
    for cache, _ in steps(golden, method):
        for layer, expected in zip(kept(cache), case["kept"], strict=True):
            assert all(len(head) == recent + best for head in layer)
            assert [[place for place in head if place != first] for head in layer] == expected


def test_quest_reads_the_pages_of_theirs_and_always_the_last_one():
    golden, found = GOLDEN["Quest"], []

    class Watched(tw.Quest):
        def promise(self, query, notes):
            found.append(super().promise(query, notes))
            return found[-1]

    method, page, same = Watched(keep=f"{golden['count']} tokens", page=golden["page"]), golden["page"], 0
    for step, (cache, logits) in enumerate(steps(golden, method)):
        if step == 0:
            assert_close(logits, torch.tensor(golden["logits"][0]), **NEAR)
            continue
        bounds = torch.tensor(golden["bounds"][step - 1])
        # Sums of large products: on their scale.
        assert_close(found[-1][0, :, 0] / bounds.max(), bounds / bounds.max(), atol=1e-5, rtol=0)
        assert all(bool(cache.kept(layer).all()) for layer in range(2))
        last = golden["tokens"] + step - 1
        for head, theirs in enumerate(golden["read"][step - 1]):
            read = kept(cache)[2][head]
            if last in theirs:
                same += 1
                assert read == theirs
            else:
                # As their kernels have it: the last page in the place of the one that promises least.
                pages = {place // page for place in theirs}
                least = min(pages, key=lambda at: float(bounds[head, at]))
                assert {place // page for place in read} == pages - {least} | {last // page}
    assert 10 < same < 40


@pytest.mark.parametrize("similarity", [None, 0.9])
@pytest.mark.parametrize("case", GOLDEN["TokenSelect"]["cases"], ids=lambda case: str(case["pieces"]))
def test_token_select_reads_and_answers_as_theirs_does(case, similarity):
    golden = GOLDEN["TokenSelect"]
    count = golden["sink"] + golden["count"] + case["recent"]
    fields = {"sink": golden["sink"], "recent": case["recent"], "similarity": similarity}
    method = tw.TokenSelect(keep=f"{count} tokens", **fields)
    for step, (cache, logits) in enumerate(steps(golden, method, case["pieces"])):
        assert_close(logits, torch.tensor(case["logits"][step]), **NEAR)
        if step > 0:
            assert kept(cache) == [[layer] * golden["heads"] for layer in case["read"][step - 1]]


def test_lag_kv_keeps_what_theirs_does():
    golden = GOLDEN["LagKV"]
    method = tw.LagKV(keep=f"{len(golden['kept'][0][0])} tokens", sink=golden["sink"], lag=golden["lag"])
    assert kept_of_a_prompt(golden, method, golden["tokens"], golden["heads"]) == golden["kept"]


def test_kv_zip_scores_and_keeps_as_theirs_does(monkeypatch):
    golden, found = GOLDEN["KVzip"], []
    plain = tw.KVzip.score
    monkeypatch.setattr(tw.KVzip, "score", lambda self, tokens: found.append(plain(self, tokens)) or found[-1])
    asked = {name: golden[name] for name in ("instruction", "continuation", "suffix", "chunk")}
    method = tw.KVzip(keep=golden["share"], sink=0, **asked)
    layers = kept_of_a_prompt(golden, method, golden["tokens"], golden["heads"])
    for layer, expected in zip(found, golden["scores"], strict=True):
        assert_close(layer[0], torch.tensor(expected), **NEAR)
    ours, theirs = (
        {
            (layer, head, place)
            for layer, heads in enumerate(kept)
            for head, places in enumerate(heads)
            for place in places
        }
        for kept in (layers, golden["kept"])
    )
    # What scores as much as the threshold goes in theirs.
    assert theirs < ours
    assert len(ours) == len(theirs) + 1


def test_think_keeps_the_channels_that_theirs_does():
    golden = GOLDEN["ThinK"]
    model = model_of(golden)
    with tw.evict(model, tw.ThinK(channels=golden["share"])) as cache:
        model(golden_tokens(golden["tokens"]), past_key_values=cache)
        assert [layer.notes["channels"][0].tolist() for layer in cache.layers] == golden["channels"]
