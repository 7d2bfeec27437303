"""A cache that selects, where later turns are padded, too: padding stands between the tokens of a row."""

import copy

import pytest
import torch
from conversations import assert_rows_are_as_alone, batch_of, read
from small_decoders import decoder, difference, generate
from transformers import DynamicCache

import tokenwise as tw

TURNS = [(30, 22), (12, 5), (1, 1), (3, 11), (1, 1), (1, 1), (6, 6), (1, 1), (2, 9), (1, 1), (1, 1)]
"""Tokens of the first row and the second; single ones are generated."""
ONE_SIDED = [(18, 18), (1, 1), (7, 20), (1, 1), (4, 15), (1, 1), (1, 1)]
"""Of which the second row is never padded."""
METHODS = {
    "quest": tw.Quest(page=4),
    "quest_everywhere": tw.Quest(page=3, dense_layers=0, sink=3, recent=5),
    "mean_blocks": tw.MeanBlocks(page=4, sink=2),
    "token_select": tw.TokenSelect(sink=2, recent=3, similarity=None),
    "token_select_staying": tw.TokenSelect(sink=1, recent=4, similarity=0.3),
}


def model_of(kind="llama"):
    return decoder(kind).double()


def conversation(model, method, turns=TURNS, stop=None, **options):
    ids, mask, ends = batch_of(turns)
    with tw.evict(model, method, **options) as cache:
        return *read(cache, ids, mask, ends[:stop]), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.9, "14 tokens"])
@pytest.mark.parametrize("turns", [TURNS, ONE_SIDED], ids=["both", "one_sided"])
@pytest.mark.parametrize("name", METHODS)
def test_rows_are_as_alone(name, turns, keep, masked):
    assert_rows_are_as_alone(decoder(), METHODS[name].replace(keep=keep), turns, masked=masked)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
@pytest.mark.parametrize("name", METHODS)
def test_rows_of_other_models_are_as_alone(name, kind):
    assert_rows_are_as_alone(decoder(kind), METHODS[name].replace(keep=0.4), TURNS)


@pytest.mark.parametrize("name", METHODS)
def test_eager_rows_are_as_alone(name):
    model = decoder()
    model.set_attn_implementation("eager")
    method = METHODS[name].replace(keep=0.4)
    _, kept, mask = conversation(model, method)
    ids, _, ends = batch_of(TURNS)
    for row in range(2):
        own = mask[row]
        with tw.evict(model, method) as cache:
            alone = read(cache, ids[row : row + 1, own], own[own].unsqueeze(0), [int(own[:end].sum()) for end in ends])
        for end, found, expected in zip(ends, kept, alone[1], strict=True):
            assert torch.equal(found[:, row][..., own[:end]], expected[:, 0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_padding_is_not_read_and_the_budget_is(name, masked):
    method = METHODS[name].replace(keep=0.4)
    _, kept, mask = conversation(model_of(), method, masked=masked)
    sizes = torch.tensor([int(size) for size in mask.sum(1)])
    for each in kept:
        assert not bool((each & ~mask[None, :, None, : each.shape[-1]]).any())
    read_last = kept[-1][-1].sum(2)
    if name.startswith("token_select"):
        assert torch.equal(read_last, torch.floor(0.4 * sizes + 0.5).long().view(2, 1).expand(-1, 2))
    else:
        assert bool((read_last <= (0.4 * sizes + 0.5).view(2, 1)).all())
        assert bool((read_last > (0.4 * sizes).view(2, 1) - 2 * method.page).all())


@pytest.mark.parametrize("name", METHODS)
def test_a_row_follows_its_beam(name):
    model, method = model_of(), METHODS[name].replace(keep=0.4)
    ids, mask, ends = batch_of(TURNS)
    swapped = torch.tensor([1, 0])
    expected, kept, _ = conversation(model, method)
    for turns in (2, 3, 5):
        with tw.evict(model, method) as cache:
            read(cache, ids, mask, ends[:turns])
            cache.reorder_cache(swapped)
            found, stored = read(cache, ids[swapped], mask[swapped], ends[turns:], ends[turns - 1])
        assert float((found[swapped] - expected[:, ends[turns - 1] :])[mask[:, ends[turns - 1] :]].abs().max()) < 1e-9
        assert all(torch.equal(one[:, swapped], other) for one, other in zip(stored, kept[turns:], strict=True))


# To the end of a turn, into one beside its padding, into the padding, and into a generated token's place; and all.
TAKEN = [(4, 11), (4, 2), (4, 8), (5, 1), (5, 5), (9, 18), (9, 2), (2, 12), (2, 20), (2, 42)]


@pytest.mark.parametrize(("turns", "back"), TAKEN)
@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_taken_back(name, turns, back):
    model, method = model_of(), METHODS[name].replace(keep=0.4)
    ids, mask, ends = batch_of(TURNS)
    left = ends[turns - 1] - back
    with tw.evict(model, method) as cache:
        read(cache, ids, mask, ends[:turns])
        cache.crop(-back)
        assert cache.get_seq_length() == left
        found, kept = read(cache, ids, mask, ends[turns - 1 :], left)
    for row in range(2):
        own = mask[row]
        sizes = [int(own[:end].sum()) for end in ends]
        with tw.evict(model, method) as cache:
            row_ids, row_mask, start = ids[row : row + 1, own], own[own].unsqueeze(0), int(own[:left].sum())
            read(cache, row_ids, row_mask, sizes[:turns])
            cache.crop(start - sizes[turns - 1])
            alone, alone_kept = read(cache, row_ids, row_mask, sizes[turns - 1 :], start)
        assert float((found[row, own[left:]] - alone[0]).abs().max()) < 1e-9
        for end, one, other in zip(ends[turns - 1 :], kept, alone_kept, strict=True):
            assert torch.equal(one[:, row][..., own[:end]], other[:, 0])


@pytest.mark.parametrize("name", METHODS)
def test_a_turn_that_breaks_off_is_forgotten(name):
    model, method = model_of(), METHODS[name].replace(keep=0.4, **({"similarity": None} if "token" in name else {}))
    ids, mask, ends = batch_of(TURNS)
    expected, kept, _ = conversation(model, method)
    for turns in (1, 3, 6):
        with tw.evict(model, method) as cache:
            read(cache, ids, mask, ends[:turns])
            broken = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                read(cache, ids, mask, ends[turns : turns + 1], ends[turns - 1])
            broken.remove()
            found, stored = read(cache, ids, mask, ends[turns:], ends[turns - 1])
        assert float((found - expected[:, ends[turns - 1] :])[mask[:, ends[turns - 1] :]].abs().max()) < 1e-9
        assert all(torch.equal(one, other) for one, other in zip(stored, kept[turns:], strict=True))


@pytest.mark.parametrize("turns", [2, 5])
def test_undone_it_goes_on_as_a_cache_that_is_read_whole(turns):
    model = model_of()
    ids, mask, ends = batch_of(TURNS)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    # It reads all of each prompt, and nothing has been generated but from all of it.
    method = tw.Quest(keep="60 tokens", page=4)
    with tw.evict(model, method) as cache:
        read(cache, ids, mask, ends[:turns])
        read_last = [cache.kept(index) for index in cache.places]
        other = copy.deepcopy(cache)
        cache.undo()
        assert all(torch.equal(cache.kept(index), read_last[index]) for index in cache.places)
        stock = DynamicCache(config=model.config)
        start = 0
        for end in ends:
            options = {"attention_mask": mask[:, :end].long(), "position_ids": places[:, start:end]}
            expected = model(ids[:, start:end], past_key_values=stock, **options).logits
            if start >= ends[turns - 1]:
                for each in (cache, other):
                    found = model(ids[:, start:end], past_key_values=each, **options).logits
                    assert float((found - expected)[mask[:, start:end]].abs().max()) < 1e-9
            start = end
        other.undo()


def test_all_read_is_the_stock_cache_to_the_bit():
    model = decoder()
    ids, mask, ends = batch_of(TURNS)
    stock = DynamicCache(config=model.config)
    with tw.evict(model, tw.Quest(keep=1.0)) as cache:
        for which in (cache, stock):
            model(ids[:, : ends[0]], attention_mask=mask[:, : ends[0]].long(), past_key_values=which)
        options = {"attention_mask": mask[:, : ends[3]].long(), "max_new_tokens": 6}
        found, expected = (generate(model, ids[:, : ends[3]], which, **options) for which in (cache, stock))
        assert difference(found, expected) == 0
        shown = torch.nn.functional.pad(mask[:, : ends[3]], (0, 5), value=True)
        assert torch.equal(cache.kept(0), shown.unsqueeze(1).expand(-1, 2, -1))


def test_what_is_generated_moves_nothing_again():
    model = decoder()
    ids, mask, ends = batch_of(TURNS)
    with tw.evict(model, tw.Quest(keep=0.4, page=4)) as cache:
        read(cache, ids, mask, ends[:4])
        read(cache, ids, mask, ends[4:5], ends[3])
        where, order = cache.layers[2].keys.data_ptr(), cache.layers[2].order
        options = {"position_ids": torch.full((2, 1), 50), "attention_mask": mask.new_ones(2, ends[4] + 1).long()}
        options["attention_mask"][:, : ends[4]] = mask[:, : ends[4]].long()
        model(ids[:, :1], past_key_values=cache, **options)
        assert cache.layers[2].keys.data_ptr() == where
        assert cache.layers[2].order is order
        # A prompt that is not padded is read behind it.
        whole = torch.nn.functional.pad(options["attention_mask"], (0, 2), value=1)
        places = torch.tensor([[51, 52], [51, 52]])
        kept = cache.layers[2].keys[:, :, : ends[4]].clone()
        model(ids[:, :2], past_key_values=cache, attention_mask=whole, position_ids=places)
        assert torch.equal(cache.layers[2].keys[:, :, : ends[4]], kept)
        assert cache.layers[2].keys.data_ptr() == where


def test_a_gradient_flows_through_what_is_moved():
    model, method = model_of(), tw.TokenSelect(keep="14 tokens", sink=1, recent=4)
    ids, mask, ends = batch_of(TURNS[:3])
    found = []
    for row in (slice(0, 1), slice(1, 2), slice(0, 2)):
        own = mask[row][0] if row.stop - row.start == 1 else torch.ones(ids.shape[1], dtype=torch.bool)
        with torch.enable_grad(), tw.evict(model, method) as cache:
            sizes = [int(own[:end].sum()) for end in ends]
            logits, _ = read(cache, ids[row, own], mask[row, own], sizes)
            (gradient,) = torch.autograd.grad(
                logits[:, -1].square().sum(), model.model.layers[1].self_attn.k_proj.weight
            )
        found.append(gradient)
    assert float(found[2].abs().max()) > 1e-2
    torch.testing.assert_close(found[0] + found[1], found[2], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_generated_after_a_padded_turn_is_as_alone(name):
    model, method = model_of(), METHODS[name].replace(keep=0.4)
    ids, mask, ends = batch_of(TURNS)
    with tw.evict(model, method) as cache:
        read(cache, ids, mask, ends[:1])
        found = generate(model, ids[:, : ends[1]], cache, attention_mask=mask[:, : ends[1]].long())
    for row in range(2):
        own = mask[row, : ends[1]]
        with tw.evict(model, method) as cache:
            read(cache, ids[row : row + 1, : ends[0]][:, own[: ends[0]]], own[None, own], [int(own[: ends[0]].sum())])
            alone = generate(model, ids[row : row + 1, : ends[1]][:, own], cache)
        for one, other in zip(found.logits, alone.logits, strict=True):
            assert float((one[row] - other[0]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_beams_and_several_answers_follow_their_rows(name):
    model, method = model_of(), METHODS[name].replace(keep=0.4)
    ids, mask, ends = batch_of(TURNS)
    found = []
    for masked in (False, True):
        with tw.evict(model, method, masked=masked) as cache:
            read(cache, ids, mask, ends[:1])
            cache.batch_repeat_interleave(3)
            options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
            options["attention_mask"] = mask[:, : ends[1]].long()
            found.append(generate(model, ids[:, : ends[1]], cache, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert float((found[0].sequences_scores - found[1].sequences_scores).abs().max()) < 1e-9


def test_a_padded_turn_that_fits_into_the_budget_is_read_where_it_stands():
    model, method = model_of(), tw.TokenSelect(keep="42 tokens", sink=2, recent=3)
    ids, mask, ends = batch_of(TURNS)
    with tw.evict(model, method) as cache:
        for turns in (2, 4):
            # The first row is longer in the second of these.
            read(cache, ids, mask, ends[:turns])
            assert bool(cache._memory) == (turns == 4)
            cache.reset()


@pytest.mark.parametrize("name", METHODS)
def test_another_conversation_begins_anew(name):
    model, method = model_of(), METHODS[name].replace(keep=0.4)
    ids, mask, ends = batch_of(ONE_SIDED)
    expected, kept, _ = conversation(model, method, ONE_SIDED)
    with tw.evict(model, method) as cache:
        read(cache, *batch_of(TURNS))
        cache.reset()
        found, stored = read(cache, ids, mask, ends)
    assert float((found - expected)[mask].abs().max()) < 1e-9
    assert all(torch.equal(one, other) for one, other in zip(stored, kept, strict=True))
