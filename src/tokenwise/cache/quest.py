"""Pages of tokens side by side, chosen anew for every query."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tokenwise.cache.base import CacheSelector, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall

_ROOM = 64
"""Pages that notes have room for beyond those in use."""


class _Pages(CacheSelector):
    """Reads the pages that promise most, and always the last one, which the new token is in.

    Heads that share keys read the same pages: those that promise most to any of them. Pages begin at the first token
    of each row.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    fewest: ClassVar[int] = 1
    """Pages that are read whatever the budget."""

    page: Annotated[int, Field(ge=1)]
    dense_layers: Annotated[int, Field(ge=0)] = 0
    """The first layers, which read everything."""

    @abstractmethod
    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """What is noted of pages.

        Args:
            keys: [batch, key heads, pages, page, channels].
            valid: which of them there are, [batch, 1, pages, page, 1], bool.

        Returns:
            By name, each [batch, key heads, pages, channels].
        """

    @abstractmethod
    def promise(self, query: Tensor, notes: dict[str, Tensor]) -> Tensor:
        """How much each page promises to each query.

        Args:
            query: [batch, key heads, group, channels].
            notes: of the pages, as from `summarise`.

        Returns:
            [batch, key heads, group, pages], fp32.
        """

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        import torch
        from torch.nn.functional import pad

        if tokens.layer < self.dense_layers:
            return
        known = "pages" in tokens.notes
        before = tokens.seen - call.query.shape[2] if known else 0
        # The page that is not full yet, and those that begin.
        first = (before - tokens.pads).clamp_min(0) // self.page
        span = (tokens.seen - before + self.page - 2) // self.page + 1
        pages = first.unsqueeze(1) + torch.arange(span, device=first.device)
        columns = (pages * self.page + tokens.pads.unsqueeze(1)).unsqueeze(2)
        columns = columns + torch.arange(self.page, device=first.device)
        valid = columns < tokens.seen
        rows = torch.arange(len(first), device=first.device)
        keys = tokens.keys[rows.view(-1, 1, 1), :, columns.clamp_max(tokens.seen - 1)].movedim(3, 1)
        found = self.summarise(keys, valid[:, None, :, :, None])
        needed = before // self.page + span
        for name, values in found.items():
            notes = tokens.notes.get(name)
            if notes is None:
                notes = values.new_zeros(*values.shape[:2], needed + _ROOM, values.shape[3])
            elif notes.shape[2] < needed:
                notes = pad(notes, (0, 0, 0, needed + _ROOM - notes.shape[2]))
            notes[rows.unsqueeze(1), :, pages] = values.transpose(1, 2)
            tokens.notes[name] = notes
        tokens.notes["pages"] = (tokens.seen - tokens.pads + self.page - 1) // self.page

    def select(self, tokens: StoredTokens, call: AttentionCall) -> Tensor | None:
        import torch

        from tokenwise.policies.budget import kept_count
        from tokenwise.policies.eviction import kept_counts, top_places

        total = -(-tokens.seen // self.page)
        budget = max(kept_count(self.keep, tokens.seen), min(self.protects, tokens.seen))
        most = max(self.fewest, budget // self.page)
        if tokens.layer < self.dense_layers or most >= total or budget == tokens.seen:
            return None
        query = tokens.over_queries(call.query.squeeze(2))
        names = tokens.notes.keys() - {"pages"}
        promise = self.promise(query, {name: tokens.notes[name][:, :, :total] for name in names}).amax(2)
        pages = tokens.notes["pages"].view(-1, 1, 1)
        place = torch.arange(total, device=pages.device)
        length = tokens.seen - tokens.pads.view(-1, 1, 1)
        safe = (place * self.page < self.sink) | ((place + 1) * self.page > length - self.recent)
        promise = promise.masked_fill(safe, torch.finfo(promise.dtype).max)
        promise = promise.masked_fill(place == pages - 1, float("inf")).masked_fill(place >= pages, float("-inf"))
        counts = None
        if tokens.real is not None:
            lengths = length.view(-1)
            kept = kept_counts(self.keep, lengths).maximum(lengths.clamp_max(self.protects))
            counts = (kept // self.page).clamp_min(self.fewest).minimum(pages.view(-1))
            # A row that fits into the budget is read whole.
            counts = counts.where(kept < lengths, pages.view(-1))
            most = int(counts.max())
        chosen = top_places(promise, most, counts).unsqueeze(3)
        inside = chosen * self.page + torch.arange(self.page, device=pages.device)
        if counts is None:
            # All pages are full but the last, which all rows and heads read.
            return inside.flatten(2)[..., : most * self.page - (total * self.page - tokens.seen)]
        there = (chosen >= 0) & (inside < length.unsqueeze(3))
        places = (inside + tokens.pads.view(-1, 1, 1, 1)).masked_fill(~there, -1)
        return places.flatten(2).sort(2).values


class Quest(_Pages):
    """Reads the pages of which some key could have the largest product with the query, by a bound for each page."""

    card: ClassVar[Card] = Card(
        id="cache/quest",
        paper=Paper(
            title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
            arxiv="2406.10774",
            venue="ICML 2024",
        ),
        status="VERIFIED",
        checked="the bounds and pages of the authors' code in PyTorch, the bound against true maxima, pages against "
        "the formula in fp64; the last page is always read, as in their kernels; that heads which share keys "
        "choose together, by the largest of their bounds, is ours",
        control="cache/random",
    )
    fewest: ClassVar[int] = 3

    page: Annotated[int, Field(ge=1)] = 16
    """Tokens of a page."""
    dense_layers: Annotated[int, Field(ge=0)] = 2
    """The first layers, which read everything."""

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        lowest = keys.masked_fill(~valid, float("inf")).amin(3)
        return {"least": lowest, "most": keys.masked_fill(~valid, float("-inf")).amax(3)}

    def promise(self, query: Tensor, notes: dict[str, Tensor]) -> Tensor:
        from tokenwise.signals.pages import page_bounds

        return page_bounds(query, notes["least"], notes["most"])


class MeanBlocks(_Pages):
    """Reads the blocks whose mean key has the largest product with the query."""

    card: ClassVar[Card] = Card(
        id="cache/mean_blocks",
        paper=Paper(
            title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
            arxiv="2305.16300",
            venue="NeurIPS 2023",
        ),
        status="RECONSTRUCTION",
        checked="blocks against the formula in fp64; the mean key stands for a landmark token, which a model would "
        "have to be trained for, and positions stay",
        control="cache/random",
    )

    page: Annotated[int, Field(ge=1)] = 64
    """Tokens of a block."""

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        total = keys.float().masked_fill(~valid, 0).sum(3)
        return {"mean": total / valid.sum(3).clamp_min(1)}

    def promise(self, query: Tensor, notes: dict[str, Tensor]) -> Tensor:
        return query.float() @ notes["mean"].mT
