"""Rotary position embeddings of keys that are cached already."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import attention_inputs

_AHEAD = 1000
"""Positions by which a key is moved to see how it turns."""
_CLOSE = 0.03
"""How far keys may be apart, of their length, that are the same but for rounding."""

Turn = Callable[[Tensor], Tensor]
"""Makes of keys those that stand some positions further."""


@dataclass(frozen=True)
class Rotary:
    """How a model turns its keys.

    Args:
        frequencies: radians per position of each pair of channels, [pairs], fp32; none where keys are not turned.
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
            New keys, the same to the bit where steps is 0; `keys` itself where all are, or there are no pairs.
        """
        if not len(self.frequencies):
            return keys
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

    modules, name = _embeddings(model, attention)
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


def find_rotaries(
    model: nn.Module,
    attentions: Mapping[int, nn.Module],
    field: str = "positions",
    use: str = "'compact' turns cached keys",
    fix: str = "Leave positions='original'.",
) -> dict[int, Rotary]:
    """How `model` turns the keys of each of its `attentions`: some models have layers that do not turn theirs.

    Each is tried with one token at two positions, so that nothing need be known of the model.

    Args:
        attentions: by the index of their layer.
        field, use, fix: as of `find_rotary`.

    Returns:
        By the index of the layer; without any pairs where it does not turn its keys. As `find_rotary` for layers that
        have no weights, on the device "meta".

    Raises:
        InputError: as `find_rotary`, or when a layer cannot be tried, or turns its keys otherwise than its rotary
            embedding says.
    """
    known: dict[Any, tuple[Rotary, Any]] = {}
    found = {}
    for index, attention in attentions.items():
        kind = type(attention), getattr(attention, "layer_type", None)
        if kind not in known:
            known[kind] = find_rotary(model, attention, field, use, fix), _embeddings(model, attention)[0][0]
        rotary, embedding = known[kind]
        if _device(attention).type == "meta":
            # Without weights nothing can be tried, and nothing turned.
            found[index] = rotary
            continue
        try:
            start, end = _moved_keys(model, attention, embedding)
            within = _CLOSE * start.norm()
            still = bool((end - start).norm() <= within)
            as_said = bool((rotary.turn(start, _steps(start)) - end).norm() <= within)
        except Exception as error:  # whatever keeps a model's own code from being called so
            why = f"how layer {index} of {type(model).__name__} turns them cannot be tried ({error})"
            raise InputError(Problem(field, f"{use}, and {why}.", fix)) from error
        if not still and not as_said:
            why = f"layer {index} of {type(model).__name__} turns them otherwise than its rotary embedding says"
            raise InputError(Problem(field, f"{use}, and {why}.", fix))
        found[index] = Rotary(rotary.frequencies[:0], rotary.interleaved) if still else rotary
    return found


def _embeddings(model: nn.Module, attention: nn.Module) -> tuple[list[Any], str]:
    """The modules that may turn the keys of `attention`, and the name of their frequencies."""
    # Where layers of several types turn keys differently each has its frequencies.
    typed = f"{getattr(attention, 'layer_type', None)}_inv_freq"
    name = typed if any(isinstance(getattr(module, typed, None), Tensor) for module in model.modules()) else "inv_freq"
    return [module for module in model.modules() if isinstance(getattr(module, name, None), Tensor)], name


def _steps(keys: Tensor) -> Tensor:
    return torch.full((1, 1, 1), _AHEAD, device=keys.device)


@torch.no_grad()
def _moved_keys(model: Any, attention: Any, embedding: Any) -> tuple[Tensor, Tensor]:
    """The keys that `attention` makes of the same token at position 0 and `_AHEAD`, [1, key heads, 1, head_dim]
    each, fp32."""
    device = _device(attention)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, attention.config.hidden_size, generator=generator, device="cpu")
    hidden = hidden.to(device, model.get_input_embeddings().weight.dtype)
    takes = inspect.signature(attention.forward).parameters
    if takes.keys().isdisjoint({"position_embeddings", "position_ids"}):
        raise TypeError(f"{type(attention).__name__} is not told positions")
    typed = "layer_type" in inspect.signature(embedding.forward).parameters
    # In training keys may differ by chance.
    modes = {module: module.training for module in attention.modules()}
    attention.eval()
    keys = []
    try:
        for place in (0, _AHEAD):
            positions = torch.full((1, 1), place, device=device)
            turns = embedding(hidden, positions, *([attention.layer_type] if typed else []))
            turns = turns.to(device) if isinstance(turns, Tensor) else tuple(each.to(device) for each in turns)
            given: dict[str, Any] = {
                "position_embeddings": turns,
                "position_ids": positions,
                "attention_mask": None,
                "shared_kv_states": {},  # where Gemma 4 would leave keys for other layers
            }
            options = {name: value for name, value in given.items() if name in takes}
            keys.append(attention_inputs(attention, hidden, **options).key.float())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return keys[0], keys[1]


def _device(module: nn.Module) -> torch.device:
    """Where a module computes, wherever accelerate keeps its weights."""
    for each in module.modules():
        device = getattr(getattr(each, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _quarter_turn(attention: nn.Module) -> list[float] | None:
    """What the model's own code makes of the channels 0, 1, 2, 3 where it turns each pair by a quarter; None where it
    has no function of a known name for it."""
    names, channels = vars(sys.modules[type(attention).__module__]), torch.arange(4.0)
    if "rotate_half" in names:
        return list(names["rotate_half"](channels).tolist())
    if "_apply_rotary_emb" in names:  # gpt-oss, which has one cosine and sine for each pair
        return list(names["_apply_rotary_emb"](channels, torch.zeros(2), torch.ones(2)).tolist())
    return None
