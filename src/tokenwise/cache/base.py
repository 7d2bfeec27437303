"""What every method of the family is: a score for each cached token; what is done with it is written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenwise.errors import Problem
from tokenwise.method import Method
from tokenwise.policies.budget import Keep, KeepOrBytes

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.rotary import Rotary
    from tokenwise.models.tap import AttentionCall
    from tokenwise.signals.attention import Divisors


@dataclass
class StoredTokens:
    """What one layer of the cache stores, when its tokens are scored.

    Args:
        keys: [batch, key heads, stored, head_dim], after rotary embedding.
        values: [batch, key heads, stored, value_dim].
        positions: of each stored token among all seen, [batch, key heads or 1, stored], int64; all padding of a row is
            counted in front, whether it stands there or before a later turn.
        real: which count; the others are padding or fill up rows, [batch, key heads or 1, stored], bool. None where all
            do.
        pads: columns of each row that are padding, [batch], int64.
        seen: columns seen so far, padding included.
        layer: index of the layer among those whose cache is evicted from, from 0.
        layers: how many of these there are.
        scaling: the attention's factor on its scores.
        softcap: bound of the scores, or None.
        query_heads: a multiple of the key heads.
        module: the attention module.
        tracks: what the method knows of each stored token, by name, each [batch, key heads, stored]; follows the
            tokens, 0 for new ones. ``received`` where the method reads it: the attention each key has received, summed
            over queries and the heads that share the key, fp32.
        notes: what it knows of each row, by name, each [batch, ...]. ``queries`` where it reads them: the last
            `CachePolicy.window` queries, [batch, query heads, window or fewer, head_dim]; ``asked``, which of these are
            no padding, [batch, window or fewer], bool, where not all are known to be none.
            ``repeats`` while the prompt is repeated, where the method reads it: the position of the token that each
            query repeats, -1 for a query that repeats none, -2 for padding, [batch, queries], int64.
        rotary: how this layer turns queries and keys, where the method reads it.
        sinks: a further score of each query head, as of `AttentionCall`, [query heads], or None.
        earlier: what the layers before noted for this one while the same tokens were scored, by name, each
            [batch, seen]. ``kept`` where the method reads ``earlier``: what the layer before stores. Empty in the
            first layer, and where nothing had to go yet.
        counts: while tokens are scored, how many of them each head of a row is to keep, were the layer's budget shared
            evenly; of each row.
        given: which positions the user protects, [batch, seen], bool, or None.
        new: where each step reads some tokens, which of the call's own ones are no padding, [batch, queries], bool;
            None where all are.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    real: Tensor | None
    pads: Tensor
    seen: int
    layer: int
    layers: int
    scaling: float
    softcap: float | None
    query_heads: int
    module: Any
    tracks: dict[str, Tensor]
    notes: dict[str, Tensor]
    rotary: Rotary | None = None
    sinks: Tensor | None = None
    earlier: dict[str, Tensor] = field(default_factory=dict)
    counts: Sequence[int] = ()
    given: Tensor | None = None
    new: Tensor | None = None

    def over_queries(self, values: Tensor) -> Tensor:
        """[batch, query heads, ...] as the heads that share a key beside each other: [batch, key heads, group, ...]."""
        return values.unflatten(1, (self.keys.shape[1], -1))

    def grouped_sinks(self) -> Tensor | None:
        """The sinks for scores of [batch, key heads, group, queries, stored]: [key heads, group, 1, 1]; or None."""
        return None if self.sinks is None else self.sinks.view(self.keys.shape[1], -1, 1, 1)

    def window_rows(self) -> Tensor:
        """The attention of the last queries over all that is stored.

        Returns:
            [batch, key heads, group, window, stored], fp32; each row sums to 1, with sinks to less, or is 0 where the
            query is padding.
        """
        import torch

        from tokenwise.signals.attention import attention_softmax

        queries = self.over_queries(self.notes["queries"]).float()
        # Heads that share keys are multiplied with them at once: one by one each would be given a copy.
        scores = (queries.flatten(2, 3) * self.scaling) @ self.keys.float().transpose(2, 3)
        scores = scores.unflatten(2, queries.shape[2:4])
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        count = queries.shape[3]
        places = torch.arange(self.seen - count, self.seen, device=scores.device)
        seen = self.positions.unsqueeze(2) <= places.view(1, 1, -1, 1)
        if self.real is not None:
            seen = seen & self.real.unsqueeze(2)
        # In place: new memory of this size takes longer than the work.
        scores.masked_fill_(~seen.unsqueeze(2), torch.finfo(scores.dtype).min)
        rows = attention_softmax(scores, self.grouped_sinks(), in_place=True)
        asked = self.notes.get("asked")
        return rows if asked is None else rows.mul_(asked.view(-1, 1, 1, count, 1))

    def received(self, call: AttentionCall, temperature: float = 1.0, divisors: Divisors | None = None) -> Tensor:
        """The attention that each stored token receives from the queries of a call, padding left out.

        Args:
            call: over what is stored.
            temperature, divisors: as for `AttentionCall.columns`.

        Returns:
            [batch, key heads, stored], summed over the queries and the heads that share a key, fp32.
        """
        valid = self.asking(call)
        found = call.columns(valid, temperature, divisors)
        if valid is not None:
            found = found * valid.sum(1).clamp_min(1)[:, None, None]
        elif call.query.shape[2] > 1:
            found = found * call.query.shape[2]
        return found.unflatten(1, (call.key.shape[1], -1)).sum(2)

    def asking(self, call: AttentionCall) -> Tensor | None:
        """Which queries of a call are no padding, [batch, queries], bool; None where all are known to be none."""
        from tokenwise.cache.padding import asking

        return asking(self.notes, self.seen, call.query.shape[2])

    def accumulate(self, name: str, values: Tensor) -> None:
        """Add `values`, [batch, key heads or 1, stored], to a track."""
        before = self.tracks.get(name)
        self.tracks[name] = values if before is None else before + values

    def summed_over_heads(self, values: Tensor) -> Tensor:
        """The sum over all heads that store the same token: [batch, key heads, stored] as
        [batch, key heads or 1, stored]."""
        if self.positions.shape[1] == 1:
            return values.sum(1, keepdim=True)
        total = self.by_position(values)
        return total.gather(1, self.positions.flatten(1)).view_as(self.positions)

    def by_position(self, values: Tensor) -> Tensor:
        """[batch, key heads, stored] as [batch, seen]: summed over heads, 0 for a token that none stores."""
        positions = self.positions.expand_as(values)
        if self.real is not None:
            values = values.masked_fill(~self.real, 0)
        return values.new_zeros(len(values), self.seen).scatter_add_(1, positions.flatten(1), values.flatten(1))


class CacheMethod(Method):
    """What methods that free cached tokens and methods that read some of them at each step have in common."""

    family: ClassVar[str] = "cache"
    traits: ClassVar[tuple[str, ...]] = ("reads", "mode")
    reads: ClassVar[frozenset[str]] = frozenset()
    """What the score is made of: ``keys``, ``values``, ``queries`` (those of this step), ``last`` (the attention of the
    last query), ``window`` (that of the last ones), ``received`` (the attention of all of them), ``earlier`` (what the
    layers before keep), ``rotary`` (how queries are turned), ``repetition`` (the attention of the prompt when it is
    read a second time)."""
    mode: ClassVar[Literal["evict", "select"]]
    """Whether tokens leave the cache, or each step reads some of those stored."""

    dense_at_full: ClassVar[bool] = True
    """Whether nothing is done with ``keep=1``."""

    keep: KeepOrBytes = 0.5
    """What stays of the tokens seen, in each layer and head, as a mean; or memory for the keys and values of the whole
    batch."""
    sink: Annotated[int, Field(ge=0)] = 0
    """Tokens at the beginning that stay, within the budget."""
    recent: Annotated[int, Field(ge=0)] = 0
    """Tokens at the end that stay, within the budget."""

    @property
    def protects(self) -> int:
        """How many tokens stay whatever their score."""
        return self.sink + self.recent


class CachePolicy(CacheMethod):
    """Keeps the cached tokens that matter.

    A subclass scores the tokens that a layer stores (`score`); which of them stay under the budget, what is protected,
    and that the memory of the others is freed, is done here for all.
    """

    mode: ClassVar[Literal["evict", "select"]] = "evict"
    ordered: ClassVar[bool] = True
    """Whether the score of a token depends on which ones are stored beside it; where not, a generated token takes the
    place of the one that is evicted, and nothing is copied."""

    interval: Annotated[int, Field(ge=1)] | None = None
    """Evict while generating, too, every so many tokens; None: only when a prompt, or a part of one, has been read."""
    positions: Literal["original", "compact"] = "original"
    """Whether tokens keep their positions, or stand as close together as what is stored."""
    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "evenly"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Of its even share what each head keeps anyway, when heads share a budget; the rest goes to the best tokens, with
    `allocate` ``heads`` to each head by how many of the best it has."""
    beta: Annotated[float, Field(gt=1)] = 20.0
    """How small the last layer's share is, with `allocate` ``pyramid``: one part in so many."""
    bits: Literal[8, 4] | None = None
    """Bits of a channel in a second tier: what the budget's bytes leave over is spent on tokens with lower scores in so
    many bits. None: all that stays is exact."""
    exact: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the budget's bytes for exact tokens, those with the highest scores, with `bits`."""

    @property
    def window(self) -> int:
        """How many of the last queries are read; their tokens are protected unless the method says otherwise."""
        return 0

    @property
    def protects(self) -> int:
        """How many tokens stay whatever their score, however small the budget."""
        return self.sink + max(self.recent, self.window)

    def last(self, count: int) -> int:
        """How many tokens at the end stay whatever their score under a budget of `count`."""
        return max(self.recent, self.window)

    def refuses(self, module: Any) -> Problem | None:
        """Why the method cannot work with an attention module; None where it can."""
        return None

    def protected(self, tokens: StoredTokens) -> Tensor:
        """Which of the tokens that are scored stay whatever their score, [batch, key heads or 1, stored], bool."""
        from tokenwise.policies.eviction import protected

        counts, given = tokens.counts, tokens.given
        if given is not None:
            # A share of the budget for the last tokens is one of what the given ones leave.
            counts = [count - some for count, some in zip(counts, given.sum(1).tolist(), strict=True)]
        recent = [self.last(count) for count in counts]
        return protected(tokens.positions, tokens.pads, tokens.seen, self.sink, recent, given)

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        """Look at an attention call, after the new tokens are stored: the place to note something in ``tokens.tracks``
        or ``tokens.notes``."""
        if "received" in self.reads:
            tokens.accumulate("received", tokens.received(call))

    def repetitions(self, ids: Tensor, real: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is read once more behind the prompt and then forgotten, where the method reads ``repetition``.

        Args:
            ids: of the tokens not yet repeated, [batch, tokens], int64.
            real: which count, in each row the first ones, [batch, tokens], bool.

        Yields:
            The ids of each further pass, and the place in `ids` that each repeats, both [batch, queries], int64; -1 for
            what repeats none, -2 for padding, behind all others.
        """
        raise NotImplementedError

    def key_channels(self, tokens: StoredTokens) -> Tensor | None:
        """Which channels of the keys stay, [batch, key heads, kept], int64, rising; None for all.

        Asked once, after the first prompt has been scored and before anything is evicted.
        """
        return None

    @abstractmethod
    def score(self, tokens: StoredTokens) -> Tensor:
        """How much each stored token matters, [batch, key heads or 1, stored]; larger stays, -inf never does."""


class CacheSelector(CacheMethod):
    """Stores all tokens, and reads those at each step that matter to its query: nothing is lost, and less is read.

    A subclass says which (`select`); that the attention is given these alone is done here for all. A prompt is read
    with full attention, or its later parts are, too, where `parts` says so.
    """

    mode: ClassVar[Literal["evict", "select"]] = "select"
    parts: ClassVar[bool] = False
    """Whether parts of a prompt that follow others are read with a selection, too, and not generated tokens alone."""

    keep: Keep = 0.25
    """What is read of the tokens seen, in each layer and head that selects."""
    sink: Annotated[int, Field(ge=0)] = 0
    """Tokens at the beginning that are always read, within the budget."""
    recent: Annotated[int, Field(ge=0)] = 0
    """Tokens at the end that are always read, within the budget."""

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        """Look at an attention call, after the new tokens are stored: the place to note something in
        ``tokens.notes``."""

    @abstractmethod
    def select(self, tokens: StoredTokens, call: AttentionCall) -> Tensor | None:
        """Which of the stored tokens this call reads, those of the call itself among them.

        Returns:
            Their places, [batch, key heads or 1, read], int64, rising; None where it reads all. Where a batch is
            padded, rows may read different numbers: -1 fills up and stands first. All padding of a row, that of later
            turns, too, stands in front of its tokens: what is noted of places moves when there is more of it.
        """
