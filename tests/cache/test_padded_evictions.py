"""Padding between turns: what a row keeps, and what the model answers, is what it is alone, whatever the method."""

import contextlib

import pytest
import torch
from conversations import METHODS, assert_rows_are_as_alone
from hypothesis import given, settings
from hypothesis import strategies as st
from small_decoders import decoder, prompt

import tokenwise as tw
from tokenwise.errors import InputError

TURNS = [(30, 22), (12, 5), (3, 11), (1, 1), (6, 6), (1, 1), (2, 9)]
"""Tokens of the first row and the second; single ones are generated."""


def alone(name):
    """The method, where scores do not make neighbours equal: of few tokens rounding would say which of them stay."""
    method = METHODS[name]
    return method.replace(kernel=1) if "kernel" in type(method).model_fields else method


NAMES = [name for name in METHODS if name != "random"]
"""Chance belongs to the batch."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_as_alone(name, masked):
    assert_rows_are_as_alone(decoder(), alone(name).replace(keep=0.4, sink=2, recent=5), TURNS, masked=masked)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", ["snap_kv", "chunk_kv", "critical_kv", "pyramid_kv", "think"])
def test_neighbours_are_those_of_the_row(name, bits):
    method = METHODS[name].replace(keep=0.8, recent=2, bits=bits)
    assert_rows_are_as_alone(decoder(), method, [(21, 21), (34, 34), (8, 34), (34, 13), (12, 21)])


@given(name=st.sampled_from(NAMES), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_conversation_is_as_alone(name, data):
    method, masked = alone(name), data.draw(st.booleans())
    # One token read alone is a generated one, and is not beside a longer turn.
    turn = st.sampled_from([(1, 1), *((one, other) for one in (2, 3, 5, 8, 21) for other in (2, 5, 13, 34))])
    turns = data.draw(st.lists(turn, min_size=1, max_size=5))
    method = method.replace(
        keep=data.draw(st.sampled_from([0.05, 0.25, 0.4, 0.8, "9 tokens", "20 tokens", "60 tokens"])),
        recent=data.draw(st.sampled_from([0, 2, 5])),
        sink=data.draw(st.sampled_from([0, 1, 3])),
    )
    if name not in ("sp_atten_cache", "think"):
        method = method.replace(positions=data.draw(st.sampled_from(["original", "compact"])))
    if name not in ("sp_atten_cache", "kv_zip"):
        method = method.replace(interval=data.draw(st.sampled_from([None, 1, 3])))
        allocate = st.sampled_from(["evenly", "pyramid", "heads", "layers_and_heads"])
        method = method.replace(allocate=data.draw(allocate))
    piece = None if (1, 1) in turns else data.draw(st.sampled_from([None, 3, 7]))
    protect = None
    if isinstance(method.keep, float) and data.draw(st.booleans()):
        protect = torch.arange(2 * max(turns[0])).view(2, -1) % 7 == data.draw(st.integers(0, 6))
    assert_rows_are_as_alone(decoder(), method, turns, piece, protect, masked=masked)


@pytest.mark.parametrize(
    "method", [*map(alone, NAMES), tw.Quest(page=4), tw.MeanBlocks(page=4), tw.TokenSelect()], ids=str
)
@torch.no_grad()
def test_padding_may_be_longer_than_a_piece(method):
    model, ids = decoder().double(), prompt(40, 2)
    mask = torch.ones_like(ids)
    mask[0, :27] = 0
    options = {"attention_mask": mask, "prefill_chunk_size": 8, "max_new_tokens": 5, "do_sample": False}
    found = []
    for keep, masked in ((0.4, False), (0.4, True), (1.0, False)):
        with tw.evict(model, method.replace(keep=keep), masked=masked) as cache:
            answer = model.generate(
                ids, **options, past_key_values=cache, output_logits=True, return_dict_in_generate=True
            )
            found.append(torch.stack(answer.logits))
    stock = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    assert float((found[0] - found[1]).abs().max()) < 1e-4
    if method.dense_at_full:
        assert torch.equal(found[2], torch.stack(stock.logits))


@pytest.mark.parametrize("held", [False, True])
@torch.no_grad()
def test_padding_behind_tokens_is_refused(held):
    model, ids = decoder(), prompt(20, 2)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0

    def read(cache):
        with cache.held() if held else contextlib.nullcontext():
            model(ids, attention_mask=mask, past_key_values=cache)

    with tw.evict(model, tw.KNorm(keep=0.4)) as cache, pytest.raises(InputError, match="Pad on the left"):
        read(cache)
