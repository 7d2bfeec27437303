"""What a method's own work takes of a model's time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tokenwise.method import Method

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
    """Stands for a method, or around what is done for it, and adds up the time.

    Attributes:
        seconds: of all of it so far; what is done within another part of it is counted once.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self._method = method
        self._device = device
        self._running = False
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._method, name)
        return self.timed(found) if name in _DECISIONS else found

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added."""

        def call(*args: Any) -> Any:
            if self._running:
                return function(*args)
            self._running, start = True, now(self._device)
            try:
                return function(*args)
            finally:
                self.seconds += now(self._device) - start
                self._running = False

        return call

    @contextmanager
    def around(self, owner: object, names: tuple[str, ...]) -> Iterator[None]:
        """Add the time of an object's own functions, by their names."""
        for name in names:
            setattr(owner, name, self.timed(getattr(owner, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(owner, name)
