"""What a second reading repeats is decided for each row, and follows it."""

import pytest
import torch
from conversations import assert_rows_are_as_alone, batch_of, read
from small_decoders import decoder, prompt

import tokenwise as tw

ASKED = {"chunk": 7, "instruction": [3, 4], "continuation": [5], "suffix": [6]}
TURNS = [(8, 30), (1, 1), (5, 5), (14, 14), (9, 9)]
"""Tokens of the first row and the second; of single ones none is a turn."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("allocate", ["evenly", "pyramid", "heads", "layers_and_heads"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_row_that_fits_is_repeated_when_it_no_longer_does(kind, allocate, masked):
    method = tw.KVzip(keep="20 tokens", allocate=allocate, **ASKED)
    stored = assert_rows_are_as_alone(decoder(kind), method, TURNS, masked=masked)
    assert stored == [[8, 9, 14, 20, 20], [20, 21, 20, 20, 20]]


@pytest.mark.parametrize("piece", [None, 6])
@pytest.mark.parametrize(("keep", "first"), [("20 tokens", (16, 21)), ("32 tokens", (26, 30)), (0.9, (4, 9))])
def test_rows_whose_turns_have_different_lengths_are_as_alone(keep, first, piece):
    method = tw.KVzip(keep=keep, **ASKED)
    stored = assert_rows_are_as_alone(decoder(), method, [first, (5, 9), (11, 6), (9, 14)], piece)
    assert stored[0][0] == first[0]
    # In the second turn the last of the rows that wait is repeated, with both.
    assert stored[1][1] < sum((first[1], 9))


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_of_which_all_is_protected_waits(padded):
    turns = [(20 if padded else 30, 30), (10, 10)]
    protect = torch.stack([torch.ones(30, dtype=torch.bool), torch.zeros(30, dtype=torch.bool)])
    method = tw.KVzip(keep=0.9, **ASKED)
    stored = assert_rows_are_as_alone(decoder(), method, turns, protect=protect)
    assert stored == [[turns[0][0], 27 if padded else 36], [27, 36]]


def test_what_waits_follows_its_row():
    model, method = decoder().double(), tw.KVzip(keep="20 tokens", **ASKED)
    ids, mask, ends = batch_of(TURNS)
    swapped = torch.tensor([1, 0])
    with torch.no_grad(), tw.evict(model, method) as cache, tw.evict(model, method) as plain:
        for each in (cache, plain):
            read(each, ids, mask, ends[:2])
        cache.reorder_cache(swapped)
        found, kept = read(cache, ids[swapped], mask[swapped], ends[2:], ends[1])
        expected, plainly = read(plain, ids, mask, ends[2:], ends[1])
    assert float((found[swapped] - expected).abs().max()) < 1e-5
    assert all(torch.equal(one[:, swapped], other) for one, other in zip(kept, plainly, strict=True))


def test_a_prompt_of_which_rows_are_repeated_before_it_ends_is_as_the_plain_one():
    model, method = decoder(), tw.KVzip(keep=0.5, **ASKED)
    ids, mask, _ = batch_of([(24, 30)])
    options = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad(), tw.evict(model, method) as cache, tw.evict(model, method) as plain:
        model(ids, past_key_values=plain, **options)
        with cache.held():
            model(ids, past_key_values=cache, **options)
            cache.batch_repeat_interleave(2)
        for index in cache.places:
            assert torch.equal(cache.kept(index), plain.kept(index).repeat_interleave(2, 0))


def test_a_prompt_whose_end_is_taken_back_before_it_ends_is_as_without():
    model, method = decoder(), tw.KVzip(keep=0.5, **ASKED)
    ids, mask, _ = batch_of([(24, 30)])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), tw.evict(model, method) as cache, tw.evict(model, method) as plain:
        options = {"attention_mask": mask[:, :27].long(), "position_ids": places[:, :27]}
        model(ids[:, :27], past_key_values=plain, **options)
        with cache.held():
            model(ids, past_key_values=cache, attention_mask=mask.long(), position_ids=places)
            cache.take_back(3)
        assert all(torch.equal(cache.kept(index), plain.kept(index)) for index in cache.places)


@pytest.mark.parametrize("masked", [False, True])
def test_a_look_that_breaks_off_leaves_the_prompt(masked, monkeypatch):
    model, ids = decoder(), prompt(40)
    plain, method = tw.KVzip.observe, tw.KVzip(keep=0.5, chunk=16)
    looks = []

    def observe(self, tokens, call):
        looks.append(tokens.layer)
        if len(looks) == 5:
            raise MemoryError
        plain(self, tokens, call)

    with torch.no_grad(), tw.evict(model, method, masked=masked) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(tw.KVzip, "observe", observe)
            with pytest.raises(MemoryError):
                model(ids, past_key_values=cache)
        assert looks[3:] == [0, 1]
        assert not any("repeats" in layer.notes for layer in cache.layers)
        model(ids[:, :1], past_key_values=cache)
        found = model(ids[:, :5], past_key_values=cache).logits
    with torch.no_grad(), tw.evict(model, method, masked=masked) as cache, cache.held():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        expected = model(ids[:, :5], past_key_values=cache).logits
    assert float((found - expected).abs().max()) < 1e-4
