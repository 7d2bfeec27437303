"""What has been looked at, or nearly so."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from tokenwise.cache.base import StoredTokens
from tokenwise.cache.h2o import H2O
from tokenwise.method import Card, Paper
from tokenwise.policies.budget import KeepOrBytes

if TYPE_CHECKING:
    from torch import Tensor

    from tokenwise.models.tap import AttentionCall
    from tokenwise.signals.attention import Divisors


class Keyformer(H2O):
    """Keeps key tokens: those that have received the most attention, if it is read with noise and ever more evenly.

    The noise makes up for the attention that would have gone to tokens that are gone.
    """

    card: ClassVar[Card] = Card(
        id="cache/keyformer",
        paper=Paper(
            title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
            arxiv="2403.09054",
            venue="MLSys 2024",
        ),
        status="VERIFIED",
        checked="the scores of the authors' code with the same noise, while its temperature rises, what it keeps of a "
        "prompt, and the formula in fp64; theirs counts the token to come among the last and always drops the "
        "first of these, has one score for all rows of a batch, and its budget is a share of the prompt",
        control="cache/random",
    )

    keep: KeepOrBytes = 0.6
    """What stays of the tokens seen, in each layer and head, as a mean; or memory for the keys and values of the whole
    batch."""
    recent_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the budget, less `sink`, that goes to the tokens at the end; `recent` of them stay at least."""
    gumbel: bool = True
    """Add Gumbel noise to the attention scores that are read."""
    tau_start: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the attention that is read while a prompt is read."""
    tau_end: Annotated[float, Field(gt=0)] = 2.0
    """Temperature once `tau_steps` tokens have been generated."""
    tau_steps: Annotated[int, Field(ge=1)] = 128
    """Generated tokens over which the temperature goes from `tau_start` to `tau_end`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the noise."""

    def observe(self, tokens: StoredTokens, call: AttentionCall) -> None:
        import torch

        generated = tokens.notes.get("generated")
        if generated is None or call.query.shape[2] > 1:
            tokens.notes["generated"] = torch.zeros_like(tokens.pads)
        else:
            tokens.notes["generated"] = generated + 1
        steps = min(int(tokens.notes["generated"][0]), self.tau_steps)
        temperature = self.tau_start + steps / self.tau_steps * (self.tau_end - self.tau_start)
        divisors = self._divisors(tokens, call.query.shape[2]) if self.gumbel else None
        tokens.accumulate("received", tokens.received(call, temperature, divisors))

    def _divisors(self, tokens: StoredTokens, queries: int) -> Divisors:
        """The noise, the same for a row whether it is padded or not, as what divides the exponentials of the scores."""

        from tokenwise.signals.gumbel import exponential_noise

        lanes = _lanes(self.seed, tokens.layer * tokens.query_heads, tokens.query_heads, tokens.keys.device)
        pads = tokens.pads.view(-1, 1, 1)
        keys, last = tokens.positions - pads, tokens.positions[:, 0, -queries:] - tokens.pads.unsqueeze(1)
        # Rows that are alike share their noise.
        if len(pads) > 1 and bool((keys == keys[:1]).all()) and bool((pads == pads[:1]).all()):
            keys, pads, last = keys[:1], pads[:1], last[:1]
        shared = tokens.query_heads // keys.shape[1]

        def divisors(positions: Tensor, sequences: slice, heads: slice, end: int) -> Tensor:
            some = sequences if len(pads) > 1 else slice(None)
            inner = slice(heads.start // shared, -(-heads.stop // shared))
            # [rows of the batch, heads that store others, heads that share them, queries, keys].
            looked_at = keys[some, inner, None, None, :end]
            some_lanes = lanes[heads].view(1, looked_at.shape[1], -1, 1, 1)
            asking = last[some, None, None][..., positions].unsqueeze(4)
            return exponential_noise(some_lanes, asking, looked_at).flatten(1, 2)

        return divisors


@functools.lru_cache(maxsize=1024)
def _lanes(seed: int, first: int, count: int, device: Any) -> Tensor:
    """What the noise of some heads begins with; for a generated token to make it anew takes as long as the noise."""
    import torch

    from tokenwise.signals.gumbel import lane_bits

    return lane_bits(seed, torch.arange(first, first + count, device=device))
