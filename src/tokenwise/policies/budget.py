"""How much stays: shares and amounts, in one notation for every family."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_AMOUNT = re.compile(r"\s*(\d+(?:_\d+)*)\s*(tokens?)\s*")
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(bytes?|[kmg]i?b)\s*", re.IGNORECASE)
_UNITS = {"byte": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FLOPS = re.compile(r"\s*(\d*\.?\d+)\s*flops\s*")


def parse_keep(value: object) -> float | str:
    """Check a `keep` as users write it and return its canonical form.

    Args:
        value: a share in (0, 1] (a float, or the integer 1), or an amount: ``"128 tokens"``.

    Returns:
        The share as float, or the amount as ``"<count> tokens"``.

    Raises:
        ValueError: for anything else, with the fix.
    """
    if isinstance(value, str):
        amount = _AMOUNT.fullmatch(value)
        if amount and int(amount[1]) > 0:
            return f"{int(amount[1])} tokens"
        try:
            value = float(value)
        except ValueError:
            raise ValueError('is not an amount; write a share such as 0.5, or "128 tokens"') from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError('is not a share; write a number above 0 and at most 1, or "128 tokens"')
    if isinstance(value, int) and value > 1:
        raise ValueError(f'is not a share (a whole number is ambiguous); write "{value} tokens", or a share up to 1')
    if not 0 < value <= 1:
        raise ValueError("is not a share; it must be above 0 and at most 1 (what stays, not what goes)")
    return float(value)


def parse_flops(value: object) -> str | None:
    """The canonical form ``"0.4 flops"`` of a share of the dense model's operations; None for anything else."""
    amount = _FLOPS.fullmatch(value) if isinstance(value, str) else None
    return f"{float(amount[1]):g} flops" if amount and 0 < float(amount[1]) <= 1 else None


def parse_bytes(value: object) -> str | None:
    """The canonical form ``"1024 bytes"`` of an amount of memory such as ``"2 GiB"``; None for anything else."""
    amount = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if amount is None:
        return None
    count = int(float(amount[1]) * _UNITS[amount[2].lower()])
    return f"{count} bytes" if count > 0 else None


def parse_keep_or_bytes(value: object) -> float | str:
    """As `parse_keep`, and an amount of memory: ``"512 MiB"``, ``"2 GB"``, ``"100000 bytes"``."""
    found = parse_bytes(value)
    if found is not None:
        return found
    try:
        return parse_keep(value)
    except ValueError as error:
        raise ValueError(str(error).replace('"128 tokens"', '"128 tokens" or "2 GiB"')) from None


Keep = Annotated[
    float | str,
    BeforeValidator(parse_keep),
    Field(json_schema_extra={"range": 'a share in (0, 1], or "N tokens"'}),
]
"""The type of a `keep` field."""

KeepOrBytes = Annotated[
    float | str,
    BeforeValidator(parse_keep_or_bytes),
    Field(json_schema_extra={"range": 'a share in (0, 1], "N tokens", or memory such as "2 GiB"'}),
]
"""The type of a `keep` field where memory is what is spent."""


def kept_count(keep: float | str, available: int) -> int:
    """How many of `available` units stay under `keep`.

    A share rounds half up and keeps at least one unit; an amount is capped by what there is. Returns an int in
    [0, available], 0 only when nothing is available.
    """
    if available <= 0:
        return 0
    count = int(keep.split()[0]) if isinstance(keep, str) else math.floor(keep * available + 0.5)
    return min(max(count, 1), available)
