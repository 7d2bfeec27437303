"""A vote of all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CacheSelector, StoredTokens
from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall


class TokenSelect(CacheSelector):
    """Reads the tokens that all heads of a layer together vote for; while the query stays much the same the choice
    stays, too.

    A part of a prompt reads its own tokens beside the budget, and `recent` ones before each of them. A choice is made
    anew when the budget, where it is a share, has grown by a token. Tokens keep their positions: their keys are stored
    as the rotary embedding turned them, and the paper's closed-up positions are not offered.
    """

    card: ClassVar[Card] = Card(
        id="cache/token_select",
        paper=Paper(
            title="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic "
            "Token-Level KV Cache Selection",
            arxiv="2411.02886",
            venue="EMNLP 2025",
        ),
        status="RECONSTRUCTION",
        checked="what the authors' code reads of the same keys, with logits, and vote and choice against the formula "
        "in fp64; keys after the rotary embedding and original positions are ours; their code leaves the "
        "choice of a similar query switched off",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    parts: ClassVar[bool] = True

    keep: Keep = "2688 tokens"
    """What is read of the tokens seen, in each layer and head that selects."""
    sink: Annotated[int, Field(ge=0)] = 128
    """Tokens at the beginning that are always read, within the budget."""
    recent: Annotated[int, Field(ge=1)] = 512
    """Tokens at the end that are always read, within the budget."""
    similarity: Annotated[float, Field(ge=-1, le=1)] | None = 0.9
    """How similar the query must be to the one of the last choice, as a cosine over all heads, for that choice to
    stay; None: each step makes its own."""

    def select(self, tokens: StoredTokens, call: AttentionCall) -> Tensor | None:
        import torch
        from torch.nn.functional import cosine_similarity

        from tokenwise.policies.budget import kept_count
        from tokenwise.policies.eviction import kept_counts, top_places
        from tokenwise.signals.pages import votes

        seen, new = tokens.seen, call.query.shape[2]
        most = kept_count(self.keep, seen) - self.protects
        device, pads = call.query.device, tokens.pads.unsqueeze(1)
        start, end = pads + self.sink, seen - new + 1 - self.recent
        ends = None
        if tokens.new is None:
            if max(most, 0) + self.protects + new - 1 >= seen:
                return None
        else:
            # Rows have different numbers of new tokens, and each chooses among what stands before its own.
            ends = end + (~tokens.new).sum(1, keepdim=True)
            kept = kept_counts(self.keep, seen - tokens.pads).clamp_min(self.protects).unsqueeze(1)
            if bool((kept - self.protects >= ends - start).all()):
                return None
        chosen = None
        if most > 0:
            columns = torch.arange(seen, device=device)
            candidates = (columns >= start) & (columns < (end if ends is None else ends))
            counts, count = None, torch.full_like(tokens.pads, most)
            if tokens.real is not None:
                available = candidates.sum(1)
                counts = (kept_counts(self.keep, seen - tokens.pads) - self.protects).clamp_min(0).minimum(available)
                # A row that reads all of its tokens has not chosen.
                count = counts.masked_fill(counts == available, -1)
            summary = _mean_query(call.query, tokens)
            same = None
            if self.similarity is not None and "chosen" in tokens.notes:
                same = cosine_similarity(tokens.notes["summary"].flatten(1), summary.flatten(1)) >= self.similarity
                same = same & (count >= 0) & (tokens.notes["count"] == count)
            if same is not None and bool(same.all()):
                chosen = _before(tokens, most)
            else:
                found = votes(summary, tokens.keys, candidates).masked_fill(~candidates, -1).unsqueeze(1)
                chosen = top_places(found, most, counts)
                if same is not None and bool(same.any()):
                    chosen = torch.where(same.view(-1, 1, 1), _before(tokens, most), chosen)
                    summary = torch.where(same.view(-1, 1, 1), tokens.notes["summary"], summary)
                tokens.notes.update(summary=summary, chosen=chosen, count=count, chosen_pads=tokens.pads)
        first = pads + torch.arange(self.sink, device=device)
        last = torch.arange(end, seen, device=device).expand(len(pads), -1)
        if tokens.real is not None:
            first = first.masked_fill(first >= seen, -1)
            last = last.masked_fill(last < (start if ends is None else start.maximum(ends)), -1)
        parts = [first.unsqueeze(1), last.unsqueeze(1)]
        if chosen is not None:
            parts.insert(1, chosen)
        places = torch.cat(parts, 2)
        return places if tokens.real is None else places.sort(2).values


def _before(tokens: StoredTokens, most: int) -> Tensor:
    """The places of the last choice, [batch, 1, most]; -1 fills up."""
    from torch.nn.functional import pad

    chosen, pads = tokens.notes["chosen"], tokens.notes["chosen_pads"]
    if pads is not tokens.pads:
        # The padding of a later turn stands in front of these, too.
        chosen = chosen.where(chosen < 0, chosen + (tokens.pads - pads).view(-1, 1, 1))
        tokens.notes.update(chosen=chosen, chosen_pads=tokens.pads)
    return pad(chosen, (most - chosen.shape[2], 0), value=-1)


def _mean_query(query: Tensor, tokens: StoredTokens) -> Tensor:
    """The mean of the new queries that are no padding, [batch, heads, channels], fp32."""
    query = query.float()
    if tokens.new is None:
        return query.mean(2)
    real = tokens.new[:, None, :, None]
    return (query * real).sum(2) / real.sum(2)
