"""What matters in a text: where it differs from a similar one, line by line and then token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate


@dataclass(frozen=True)
class TokenizedText:
    """A text with its tokens.

    Args:
        text: the text.
        ids: token ids, [tokens].
        offsets: (start, end) of each token in characters of `text`, [tokens]; start == end for tokens without text.
    """

    text: str
    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]


def changed_spans(one: str, other: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Blocks of lines in which two texts differ: (start, end) in characters of each, in order; an empty span has
    start == end."""
    lines, others = one.splitlines(keepends=True), other.splitlines(keepends=True)
    starts, other_starts = [list(accumulate(map(len, texts), initial=0)) for texts in (lines, others)]
    return [
        ((starts[a], starts[b]), (other_starts[c], other_starts[d]))
        for tag, a, b, c, d in SequenceMatcher(None, lines, others, autojunk=False).get_opcodes()
        if tag != "equal"
    ]


def tokens_in(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Indices of the tokens that share at least one character with a span."""
    first, last = span
    return [index for index, (start, end) in enumerate(offsets) if max(start, first) < min(end, last)]


def difference_masks(one: TokenizedText, other: TokenizedText) -> tuple[list[bool], list[bool]]:
    """The tokens in which two texts differ, in each of them.

    Only tokens that overlap changed lines are compared; of these, those that stand alike in both, in the same order,
    are not flagged. Identical texts have no flags.

    Returns:
        Two masks, [tokens] each.
    """
    masks = ([False] * len(one.ids), [False] * len(other.ids))
    for mine, theirs in _changed_tokens(one, other):
        for mask, flagged in zip(masks, (mine, theirs), strict=True):
            for index in flagged:
                mask[index] = True
    return masks


def first_tokens_after_gaps(one: TokenizedText, other: TokenizedText) -> list[bool]:
    """Where `other` goes on after leaving out something that `one` has, or its last token: a mask [tokens of other]."""
    mask = [False] * len(other.ids)
    for (_, _), span in changed_spans(one.text, other.text):
        after = tokens_in(other.offsets, (span[0], len(other.text))) or tokens_in(other.offsets, (0, span[0]))[-1:]
        if after:
            mask[after[0]] = True
    return mask


def _changed_tokens(one: TokenizedText, other: TokenizedText) -> Iterator[tuple[list[int], list[int]]]:
    for span, other_span in changed_spans(one.text, other.text):
        mine, theirs = tokens_in(one.offsets, span), tokens_in(other.offsets, other_span)
        matcher = SequenceMatcher(
            None, [one.ids[index] for index in mine], [other.ids[index] for index in theirs], autojunk=False
        )
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag != "equal":
                yield mine[a:b], theirs[c:d]
