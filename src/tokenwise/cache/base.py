"""What every method of the family is: a score for each cached token; what is done with it is written once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tokenwise.method import Method
from tokenwise.policies.budget import KeepOrBytes

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.rotary import Rotary
    from tokenwise.models.tap import AttentionCall


@dataclass
class StoredTokens:
    """What one layer of the cache stores, when its tokens are scored.

    Args:
        keys: [batch, key heads, stored, head_dim], after rotary embedding.
        values: [batch, key heads, stored, value_dim].
        positions: of each stored token among all seen, [batch, key heads or 1, stored], int64.
        real: which count; the others are padding or fill up rows, [batch, key heads or 1, stored], bool. None where all
            do.
        pads: columns of padding in front of each row, [batch], int64.
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
            `CachePolicy.window` queries, [batch, query heads, window or fewer, head_dim]. ``repeats`` while the prompt
            is repeated, where the method reads it: the column of the token that each query repeats, -1 for a query that
            repeats none, -2 for padding, [batch, queries], int64.
        rotary: how the model turns queries and keys, where the method reads it.
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

    def over_queries(self, values: Tensor) -> Tensor:
        """[batch, query heads, ...] as the heads that share a key beside each other: [batch, key heads, group, ...]."""
        return values.unflatten(1, (self.keys.shape[1], -1))

    def window_rows(self) -> Tensor:
        """The attention of the last queries over all that is stored.

        Returns:
            [batch, key heads, group, window, stored], fp32; each row sums to 1, or is 0 where the query is padding.
        """
        import torch

        queries = self.over_queries(self.notes["queries"]).float()
        keys = self.keys.float().unsqueeze(2)
        scores = queries @ keys.transpose(3, 4) * self.scaling
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        count = queries.shape[3]
        places = torch.arange(self.seen - count, self.seen, device=scores.device)
        seen = self.positions.unsqueeze(2) <= places.view(1, 1, -1, 1)
        if self.real is not None:
            seen = seen & self.real.unsqueeze(2)
        rows = scores.masked_fill(~seen.unsqueeze(2), torch.finfo(scores.dtype).min).softmax(-1)
        return rows * (places >= self.pads.view(-1, 1)).view(-1, 1, 1, count, 1)


class CachePolicy(Method):
    """Keeps the cached tokens that matter.

    A subclass scores the tokens that a layer stores (`score`); which of them stay under the budget, what is protected,
    and that the memory of the others is freed, is done here for all.
    """

    family: ClassVar[str] = "cache"
    traits: ClassVar[tuple[str, ...]] = ("reads", "mode")
    reads: ClassVar[frozenset[str]] = frozenset()
    """What the score is made of: ``keys``, ``values``, ``window`` (the attention of the last queries), ``received``
    (the attention of all of them), ``rotary`` (how queries are turned), ``repetition`` (the attention of the prompt
    when it is read a second time)."""
    mode: ClassVar[Literal["evict", "select"]] = "evict"
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
    interval: Annotated[int, Field(ge=1)] | None = None
    """Evict while generating, too, every so many tokens; None: only when a prompt, or a part of one, has been read."""
    positions: Literal["original", "compact"] = "original"
    """Whether tokens keep their positions, or stand as close together as what is stored."""
    allocate: Literal["evenly", "pyramid", "heads", "layers_and_heads"] = "evenly"
    """How the budget is shared out: as much to every head; less to later layers; or to the best tokens of all heads of
    a layer, or of all layers and heads."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Of its even share what each head keeps anyway, when heads share a budget."""
    beta: Annotated[float, Field(gt=1)] = 20.0
    """How small the last layer's share is, with `allocate` ``pyramid``: one part in so many."""

    @property
    def window(self) -> int:
        """How many of the last queries are read; their tokens are protected."""
        return 0

    @property
    def protects(self) -> int:
        """How many tokens stay whatever their score."""
        return self.sink + max(self.recent, self.window)

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        """Look at an attention call, after the new tokens are stored: the place to note something in ``tokens.tracks``
        or ``tokens.notes``."""

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
        """How much each stored token matters, [batch, key heads or 1, stored]; larger stays."""
