"""Rotary position embeddings of keys that are cached already."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem


@dataclass(frozen=True)
class Turn:
    """A turn by some positions.

    Args:
        cos: of the angle of each pair of channels, [..., pairs], fp32.
        sin: likewise.
        interleaved: whether a pair lies side by side; else half the channels apart.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, keys: Tensor) -> Tensor:
        """`keys` ([..., head_dim], to whose other dimensions those of the angles broadcast) turned, in their type.

        The same to the bit where the angle is 0; channels beyond the pairs are not turned.
        """
        cos, sin, pairs = self.cos, self.sin, self.cos.shape[-1]
        rows = keys.float()
        turned, rest = rows[..., : 2 * pairs], rows[..., 2 * pairs :]
        if self.interleaved:
            first, second = turned[..., ::2], turned[..., 1::2]
            both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
        else:
            first, second = turned[..., :pairs], turned[..., pairs:]
            both = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([both, rest], -1).to(keys.dtype)


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
        moved = (steps != 0).expand(*keys.shape[:3])
        if not bool(moved.any()):
            return keys
        new = keys if in_place else keys.clone()
        new[moved] = self.by(steps.expand(*keys.shape[:3])[moved])(keys[moved])
        return new

    def by(self, steps: Tensor) -> Turn:
        """The turn by `steps` positions, to be applied more than once; [...], int64."""
        angle = steps.unsqueeze(-1) * self.frequencies.to(steps.device)
        return Turn(angle.cos(), angle.sin(), self.interleaved)


def find_rotary(
    model: nn.Module,
    attention: nn.Module,
    asked: tuple[str, str, str] = ("positions", "'compact'", "Leave positions='original'."),
) -> Rotary:
    """How `model` turns the keys of `attention`.

    Args:
        model: with the rotary embedding.
        attention: one of its attention modules.
        asked: what the user asked for, for the message of an error: its field, what turns cached keys, and the fix.

    Raises:
        InputError: when it has no rotary embedding of a known kind, or one that changes with the length.
    """

    def refuse(why: str) -> InputError:
        return InputError(Problem(asked[0], f"{asked[1]} turns cached keys, and {why}.", asked[2]))

    modules: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    rotate = vars(sys.modules[type(attention).__module__]).get("rotate_half")
    if len(modules) != 1 or rotate is None:
        raise refuse(f"{type(model).__name__} has {len(modules)} rotary embeddings of a known kind, not one")
    kind = getattr(modules[0], "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise refuse(f"the rotary embedding {kind!r} changes with the length")
    turned = rotate(torch.arange(4.0)).tolist()
    if turned not in ([-2.0, -3.0, 0.0, 1.0], [-1.0, 0.0, -3.0, 2.0]):
        raise refuse(f"{type(attention).__name__} turns its channels in a way that is not known")
    return Rotary(modules[0].inv_freq.detach().float().clone(), turned[0] == -1.0)
