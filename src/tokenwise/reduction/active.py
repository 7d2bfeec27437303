"""Which models are being reduced, and where: what cannot be done twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal
from weakref import WeakSet

from torch import nn

from tokenwise.errors import Problem

Site = Literal["encoder", "input", "decoder"]
_ACTIVE: dict[Site, WeakSet[nn.Module]] = {"encoder": WeakSet(), "input": WeakSet(), "decoder": WeakSet()}
_NAMES: dict[Site, str] = {"encoder": "in its encoder", "input": "at its input", "decoder": "in its layers"}


def claim(module: nn.Module, site: Site) -> Callable[[], None]:
    """Note that a module is being reduced; the function that forgets it."""
    _ACTIVE[site].add(module)
    return partial(_ACTIVE[site].discard, module)


def conflict(module: nn.Module, site: Site) -> Problem | None:
    """Why a module cannot be reduced at a site, beside what is being reduced; None where it can.

    One method at a site; and none in the vision tower of a model that is reduced at its input, which has a placeholder
    for each of the tower's tokens. A method at the input and one in the layers go together.
    """
    mine = set(module.modules())
    for other, owners in _ACTIVE.items():
        if (site != other and "decoder" in (site, other)) or not any(mine & set(owner.modules()) for owner in owners):
            continue
        if site == other:
            message = f"is being reduced already {_NAMES[site]}, and only one method can count its tokens."
            return Problem("model", message, "Undo that one first.")
        return Problem(
            "model",
            f"is being reduced already {_NAMES[other]}: a method for the input needs all tokens of the vision tower, "
            "for which the prompt has placeholders.",
            "Undo that one first, or use one method for the input and one inside the language model.",
        )
    return None
