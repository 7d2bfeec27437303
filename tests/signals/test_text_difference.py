"""Differences of two texts by lines and tokens."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.signals.text_difference import (
    TokenizedText,
    changed_spans,
    difference_masks,
    first_tokens_after_gaps,
    tokens_in,
)


def tokenize(text):
    found = list(re.finditer(r"\n *|\w+|[^\w\n]", text))
    return TokenizedText(text, [hash(match.group()) for match in found], [match.span() for match in found])


def flagged(tokenized, mask):
    return [tokenized.text[slice(*span)] for span, flag in zip(tokenized.offsets, mask, strict=True) if flag]


CORRECT = "def f(x):\n    if x < 3:\n        return 1\n    return x\n"


def test_worked_programs():
    wrong = CORRECT.replace("x < 3", "x <= 4")
    one, other = tokenize(CORRECT), tokenize(wrong)
    assert changed_spans(CORRECT, wrong) == [((10, 24), (10, 25))]
    masks = difference_masks(one, other)
    assert flagged(one, masks[0]) == ["3"]
    assert flagged(other, masks[1]) == ["=", "4"]

    shorter = CORRECT.replace("        return 1\n", "")
    masks = difference_masks(one, tokenize(shorter))
    assert "".join(flagged(one, masks[0])).strip() == "return 1"
    assert not any(masks[1])
    assert flagged(tokenize(shorter), first_tokens_after_gaps(one, tokenize(shorter))) == ["\n    "]

    assert not any(map(any, difference_masks(one, one)))
    assert changed_spans("", "") == []


def test_tokens_overlap_a_span_by_a_character_at_least():
    offsets = [(0, 0), (0, 2), (2, 5), (5, 5), (5, 7)]
    assert tokens_in(offsets, (2, 5)) == [2]
    assert tokens_in(offsets, (1, 6)) == [1, 2, 4]
    assert tokens_in(offsets, (3, 3)) == []


LINES = st.lists(st.sampled_from(["a = 1", "b = 2", "return a", "return b + a", "", "if a:"]), max_size=7)


@settings(max_examples=150, deadline=None)
@given(LINES, LINES)
def test_flags_cover_the_changes_and_nothing_else(lines, others):
    one, other = tokenize("\n".join(lines)), tokenize("\n".join(others))
    masks = difference_masks(one, other)
    spans = changed_spans(one.text, other.text)
    for side, tokenized, mask in ((0, one, masks[0]), (1, other, masks[1])):
        allowed = {index for span in spans for index in tokens_in(tokenized.offsets, span[side])}
        assert {index for index, flag in enumerate(mask) if flag} <= allowed
    # What is not flagged in the changed lines stands alike in both.
    kept = [
        [
            tokenized.ids[index]
            for span in spans
            for index in tokens_in(tokenized.offsets, span[side])
            if not mask[index]
        ]
        for side, tokenized, mask in ((0, one, masks[0]), (1, other, masks[1]))
    ]
    if len(spans) == 1:
        assert kept[0] == kept[1]
    if lines != others:
        assert bool(spans) == (one.text != other.text)
