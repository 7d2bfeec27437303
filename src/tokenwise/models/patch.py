"""Patches on one instance that can be undone exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute on an instance and return the function that puts it back.

    Where the instance had none of its own (a method of its class, say), undoing removes ours. Where someone else has
    replaced ours meanwhile (as accelerate does with `forward`), theirs stays: they hold a reference to ours, which
    must therefore pass everything through once its patch is undone.
    """
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)

    def undo() -> None:
        if vars(owner).get(name) is not value:
            return
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
