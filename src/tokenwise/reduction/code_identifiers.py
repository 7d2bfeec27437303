"""The pieces of one identifier as one token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import field_validator

from tokenwise.method import Card
from tokenwise.policies.budget import Keep
from tokenwise.reduction.base import EncoderReducer, LayerTokens

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.policies.plans import Shape
    from tokenwise.reduction.merge import Merge

_IDENTIFIER_OR_NUMBER = re.compile(r"\d[\w.]*|\w+")


def identifier_groups(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which tokens are pieces of one identifier, keyword or number.

    Args:
        text: the source code.
        offsets: where each token begins and ends in it, as a fast tokenizer returns with
            ``return_offsets_mapping=True``; (0, 0) for tokens that stand for no text.

    Returns:
        For each token the number of the identifier it is a piece of, counted from 0 in the text; -1 for tokens that
        are none, or that reach over its end.
    """
    spans = [match.span() for match in _IDENTIFIER_OR_NUMBER.finditer(text)]
    groups, span = [], 0
    for start, end in offsets:
        piece = text[start:end]
        start += len(piece) - len(piece.lstrip())
        if start >= end:
            groups.append(-1)
            continue
        while span < len(spans) and spans[span][1] <= start:
            span += 1
        inside = span < len(spans) and spans[span][0] <= start and end <= spans[span][1]
        groups.append(span if inside else -1)
    return groups


class CodeIdentifiers(EncoderReducer):
    """Merges the pieces of each identifier and number into one token, their mean, in the first block."""

    card: ClassVar[Card] = Card(
        id="reduction/code_identifiers",
        needs=("the groups of the tokens, from `identifier_groups`",),
        status="RECONSTRUCTION",
        checked="means over the groups in fp64, and a text alone against the same text in a batch; that merging "
        "happens between attention and feed-forward layer of the first block is ours",
        control="reduction/random_drop",
    )
    merges: ClassVar[bool] = True
    ragged: ClassVar[bool] = True
    sees_every_block: ClassVar[bool] = True
    inputs: ClassVar[tuple[str, ...]] = ("token_groups",)

    keep: Keep = 1.0
    """Left out: the identifiers decide what stays. The model's call brings ``token_groups``, [batch, tokens], int64:
    tokens of one number become one, -1 stays alone."""

    @field_validator("keep")
    @classmethod
    def _decided_by_the_text(cls, keep: float | str) -> float | str:
        if keep != 1:
            raise ValueError("is not for you to say: the identifiers decide what stays; leave it out")
        return keep

    def counts(self, shape: Shape) -> list[int]:
        return [min(shape.prefix + 1, shape.tokens)] * shape.layers

    def decide(self, tokens: LayerTokens, counts: list[int]) -> int:
        import torch

        if tokens.layer > 0:
            return tokens.hidden.shape[1]
        groups = tokens.memory.pop("token_groups")
        batch, count = groups.shape
        places = torch.arange(count, device=groups.device).expand(batch, -1)
        alone = (groups < 0) | tokens.protected()
        groups = groups.masked_fill(alone, -1) + 1
        # The place of the first piece of each identifier; tokens that stay alone point to themselves.
        first = places.new_full((batch, int(groups.max()) + 1), count).scatter_reduce(1, groups, places, "amin")
        tokens.memory["first"] = places.where(alone, first.gather(1, groups))
        return int(_stay(tokens).sum(1).max())

    def reduce(self, tokens: LayerTokens, count: int) -> Merge:
        from tokenwise.reduction.merge import Merge

        stay = _stay(tokens)
        # Texts with fewer identifiers than the longest are filled up with tokens that nobody sees.
        kept = (~stay).byte().argsort(dim=1, stable=True)[:, :count]
        target = (stay.long().cumsum(1) - 1).gather(1, tokens.memory.pop("first"))
        if tokens.padding is not None:
            target = target.masked_fill(tokens.padding, -1)
        return Merge(kept, target, fills=True)


def _stay(tokens: LayerTokens) -> Tensor:
    """Which tokens are the first of an identifier, or stay alone, [batch, tokens], bool."""
    import torch

    first = tokens.memory["first"]
    stay = first == torch.arange(first.shape[1], device=first.device)
    return stay if tokens.padding is None else stay & ~tokens.padding
