"""What the model needs to say the prompt again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tokenwise.cache.base import CachePolicy, StoredTokens
from tokenwise.method import Card, Paper

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall

_BLOCK = 128
"""Queries whose attention is held at a time."""

TokenIds = tuple[Annotated[int, Field(ge=0)], ...]


class KVzip(CachePolicy):
    """Keeps the tokens most attended to when the model reads the prompt a second time, as if it repeated it.

    The prompt is read a second time, block by block, and this is forgotten again: the time of two prompts, and the
    whole cache is stored until then. What stays serves any question that follows.
    """

    card: ClassVar[Card] = Card(
        id="cache/kv_zip",
        paper=Paper(
            title="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
            arxiv="2505.23416",
            venue="NeurIPS 2025",
        ),
        needs=("a second reading of the prompt", "token ids"),
        status="VERIFIED",
        checked="the scores of the authors' code and what it keeps, which is one token less than the budget, and the "
        "numbers of kvpress 0.5.5",
        control="cache/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"repetition"})

    sink: Annotated[int, Field(ge=0)] = 4
    """Tokens at the beginning that stay, within the budget."""
    interval: None = None
    """Evicts when a prompt has been read alone: what is generated is never repeated."""
    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "layers_and_heads"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of its even share what each head keeps anyway, when heads share a budget."""
    chunk: Annotated[int, Field(ge=1)] = 2048
    """Tokens that are repeated at a time. The authors' code has 2000, and kvpress 2048."""
    instruction: TokenIds = ()
    """Ids of what asks for the repetition, such as "Repeat the previous context exactly."; none repeats without."""
    continuation: TokenIds = ()
    """Ids of what asks for each further part, "... starting with", before the last eight tokens of the part before;
    none asks with `instruction` again."""
    suffix: TokenIds = ()
    """Ids between what asks and the repetition, such as those with which an answer begins."""

    def repetitions(self, ids: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        batch, device = len(ids), ids.device
        for start in range(0, int(real.sum(1).max()), self.chunk):
            going_on = bool(start and self.continuation)
            asked, suffix = (
                torch.tensor(given, dtype=torch.long, device=device).expand(batch, -1)
                for given in (self.continuation if going_on else self.instruction, self.suffix)
            )
            question = torch.cat([asked, ids[:, max(start - 8, 0) : start if going_on else 0], suffix], 1)
            some = slice(start, start + self.chunk)
            places = torch.arange(ids.shape[1], device=device)[some].masked_fill(~real[:, some], -2)
            yield torch.cat([question, ids[:, some]], 1), torch.cat([torch.full_like(question, -1), places], 1)

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        import torch

        from tokenwise.signals.attention import attention_softmax

        repeats = tokens.notes.get("repeats")
        if repeats is None:
            return
        batch, heads, places, _ = tokens.keys.shape
        count = repeats.shape[1]
        positions = tokens.positions.expand(batch, heads, -1)[..., : places - count]
        here = torch.zeros(batch, 1, tokens.seen + 1, dtype=torch.bool, device=repeats.device)
        here = here.scatter_(2, repeats.where(repeats >= 0, tokens.seen).unsqueeze(1), True)[..., : tokens.seen]
        repeated = here.expand(-1, heads, -1).gather(2, positions)
        shown = repeated | (positions < (tokens.pads + self.sink).view(-1, 1, 1))
        if tokens.real is not None:
            shown, repeated = (each & tokens.real[..., : places - count] for each in (shown, repeated))
        columns = shown.any(0).any(0).nonzero().squeeze(1)
        own = torch.arange(places - count, places, device=columns.device)
        keys = tokens.keys[:, :, torch.cat([columns, own])].float().unsqueeze(2).mT
        real = (repeats > -2).view(batch, 1, 1, 1, count)
        hidden = ~shown[..., columns].view(batch, heads, 1, 1, -1)
        best = torch.zeros(batch, heads, len(columns), device=columns.device)
        for start in range(0, count, _BLOCK):
            queries = tokens.over_queries(call.query[:, :, start : start + _BLOCK]).float()
            scores = queries @ keys * tokens.scaling
            if tokens.softcap is not None:
                scores = tokens.softcap * torch.tanh(scores / tokens.softcap)
            rows = torch.arange(start, start + queries.shape[3], device=columns.device)
            later = (own - own[0] > rows.unsqueeze(1)) | ~real
            mask = torch.cat([hidden.expand(-1, -1, -1, len(rows), -1), later.expand(-1, heads, -1, -1, -1)], 4)
            scores = scores.masked_fill_(mask, torch.finfo(scores.dtype).min)
            attention = attention_softmax(scores, tokens.grouped_sinks())[..., : len(columns)]
            best = best.maximum((attention * real[..., start : start + _BLOCK].mT).amax((2, 3)))
        found = tokens.tracks.get("repeated")
        found = torch.zeros(batch, heads, places, device=columns.device) if found is None else found.clone()
        found[..., columns] = best.where(repeated[..., columns], found[..., columns])
        tokens.tracks["repeated"] = found

    def score(self, tokens: StoredTokens) -> Tensor:
        return tokens.tracks["repeated"]
