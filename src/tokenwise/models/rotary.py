"""Rotary position embeddings of keys that are cached already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem

Turn = Callable[[Tensor], Tensor]
"""Makes of keys those that stand some positions further."""


@dataclass(frozen=True)
class Rotary:
    """How a model turns its keys.

    Args:
        frequencies: radians per position of each pair of channels, [pairs], fp32.
        interleaved: whether a pair lies side by side; else half the channels apart.
    """

    frequencies: Tensor
    interleaved: bool

    def turn(self, keys: Tensor, steps: Tensor, in_place: bool = False) -> Tensor:
        """Keys as they would be some positions further.

        Args:
            keys: [batch, heads, tokens, head_dim]; channels beyond the pairs are not turned.
            steps: positions to add, [batch, heads or 1, tokens], int64.
            in_place: write into `keys` rather than into new ones.

        Returns:
            New keys, the same to the bit where steps is 0; `keys` itself where all are.
        """
        steps = steps.expand(*keys.shape[:3])
        moved = steps.nonzero(as_tuple=True)
        if not len(moved[0]):
            return keys
        new = keys if in_place else keys.clone()
        new[moved] = self._turned(keys[moved], *self._angles(steps[moved])).to(keys.dtype)
        return new

    def by(self, steps: Tensor) -> Turn:
        """The turn by `steps` positions ([...], int64), to be applied to several tensors of keys [..., head_dim] to
        which they broadcast; the same to the bit where steps is 0."""
        cos, sin = self._angles(steps)
        return lambda keys: self._turned(keys, cos, sin).to(keys.dtype)

    def turn_back(self, queries: Tensor, positions: Tensor) -> Tensor:
        """Queries as they were before they were turned.

        Args:
            queries: [batch, heads, tokens, head_dim], as the model turned them.
            positions: where they stand, int64, which broadcast to [batch, heads, tokens].

        Returns:
            [batch, heads, tokens, head_dim], fp32.
        """
        return self._turned(queries, *self._angles(-positions))

    def mean_turn(self, positions: Tensor, width: int) -> Tensor:
        """The mean of the turns to `positions` ([..., any], int64).

        Returns:
            [..., width, width], fp32, to be multiplied with from the right by rows of `width` channels.
        """
        cos, sin = (part.mean(-2, keepdim=True) for part in self._angles(positions))
        rows = torch.eye(width, device=positions.device).expand(*positions.shape[:-1], -1, -1)
        return self._turned(rows, cos, sin)

    def _angles(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        angle = steps.unsqueeze(-1) * self.frequencies.to(steps.device)
        return angle.cos(), angle.sin()

    def _turned(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs, rows = len(self.frequencies), rows.float()
        turned, rest = rows[..., : 2 * pairs], rows[..., 2 * pairs :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
            both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        else:
            first, second = turned[..., :pairs], turned[..., pairs:]
            both = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([both, rest], -1)


def find_rotary(
    model: nn.Module,
    attention: nn.Module,
    field: str = "positions",
    use: str = "'compact' turns cached keys",
    fix: str = "Leave positions='original'.",
) -> Rotary:
    """How `model` turns the keys of `attention`.

    Args:
        field, use, fix: what a refusal names, why it is needed, and the way out.

    Raises:
        InputError: when it has no rotary embedding of a known kind, or one that changes with the length.
    """

    def refuse(why: str) -> InputError:
        return InputError(Problem(field, f"{use}, and {why}.", fix))

    # Where layers of several types turn keys differently each has its frequencies.
    typed = f"{getattr(attention, 'layer_type', None)}_inv_freq"
    name = typed if any(isinstance(getattr(module, typed, None), Tensor) for module in model.modules()) else "inv_freq"
    modules: list[Any] = [module for module in model.modules() if isinstance(getattr(module, name, None), Tensor)]
    turned = _quarter_turn(attention)
    if len(modules) != 1 or turned is None:
        raise refuse(f"{type(model).__name__} has {len(modules)} rotary embeddings of a known kind, not one")
    kind = getattr(modules[0], "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind[getattr(attention, "layer_type", None)]
    if kind in ("dynamic", "longrope"):
        raise refuse(f"the rotary embedding {kind!r} changes with the length")
    if turned not in ([-2.0, -3.0, 0.0, 1.0], [-1.0, 0.0, -3.0, 2.0]):
        raise refuse(f"{type(attention).__name__} turns its channels in a way that is not known")
    return Rotary(getattr(modules[0], name).detach().float().clone(), turned[0] == -1.0)


def _quarter_turn(attention: nn.Module) -> list[float] | None:
    """What the model's own code makes of the channels 0, 1, 2, 3 where it turns each pair by a quarter; None where it
    has no function of a known name for it."""
    names, channels = vars(sys.modules[type(attention).__module__]), torch.arange(4.0)
    if "rotate_half" in names:
        return list(names["rotate_half"](channels).tolist())
    if "_apply_rotary_emb" in names:  # gpt-oss, which has one cosine and sine for each pair
        return list(names["_apply_rotary_emb"](channels, torch.zeros(2), torch.ones(2)).tolist())
    return None
