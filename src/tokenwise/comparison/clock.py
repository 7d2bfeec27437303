"""What the decisions of a token reduction take of a model's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tokenwise.reduction.base import TokenReducer

_ENCODER = ("decide", "reduce")
_INPUT = ("counts_of", "select")
_DECODER = ("start", "see_attention", "see_branch", "see_neurons", "choose")
_DECISIONS = frozenset((*_ENCODER, *_INPUT, *_DECODER))


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Stands for a method and adds up the time of its decisions.

    Attributes:
        seconds: of all decisions so far.
    """

    def __init__(self, method: TokenReducer, device: torch.device) -> None:
        self._method = method
        self._device = device
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._method, name)
        return self.timed(found) if name in _DECISIONS else found

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added."""

        def call(*args: Any) -> Any:
            start = now(self._device)
            found = function(*args)
            self.seconds += now(self._device) - start
            return found

        return call
