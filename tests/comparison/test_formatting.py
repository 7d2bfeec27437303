from __future__ import annotations

import math

import pytest

from tokenwise.comparison import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0, "0"),
        (7, "7"),
        (976, "976"),
        (1234, "1.23 k"),
        (999_999, "1.00 M"),
        (2_000_000, "2.00 M"),
        (4.2e13, "42.0 T"),
        (4.2e14, "420 T"),
        (5e23, "500 Z"),
    ],
)
def test_amount(value: float | None, text: str) -> None:
    assert formatting.amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00135, "1.35 ms"),
        (0.218, "218 ms"),
        (8.26, "8.3 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (372, "6 min 12 s"),
        (7505, "2 h 05 min"),
    ],
)
def test_duration(value: float, text: str) -> None:
    assert formatting.duration(value) == text


def test_memory_and_ratio() -> None:
    assert formatting.memory(3.54 * 2**20) == "3.5 MiB"
    assert formatting.memory(9.96 * 2**20) == "10 MiB"
    assert formatting.memory(812 * 2**20) == "812 MiB"
    assert formatting.memory(1.5 * 2**30) == "1.50 GiB"
    assert formatting.ratio(1.306) == "1.31×"


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [
        (-0.0512, "−0.051", "−0.051"),
        (0.0512, "0.051", "+0.051"),
        (-0.0001, "0.000", "0.000"),
        (0.0001, "0.000", "0.000"),
        (math.nan, "not finite", "not finite"),
        (math.inf, "∞", "∞"),
        (-math.inf, "−∞", "−∞"),
    ],
)
def test_numbers(value: float, plain: str, signed: str) -> None:
    assert formatting.plain(value, 3) == plain
    assert formatting.signed(value, 3) == signed


def test_decimals_follow_the_typical_interval() -> None:
    assert formatting.decimals_for([]) == 3
    assert formatting.decimals_for([0.0, math.nan, math.inf]) == 3
    assert formatting.decimals_for([0.02, 0.03, 0.1]) == 3
    assert formatting.decimals_for([0.002]) == 4
    assert formatting.decimals_for([5.0]) == 2


def test_listing() -> None:
    assert formatting.listing(["a"]) == "a"
    assert formatting.listing(["a", "b"], "or") == "a or b"
    assert formatting.listing(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(
    ("unit", "amount", "text"),
    [
        ("keep", 0.25, "0.25"),
        ("flops", 0.5, "0.5"),
        ("tokens", 1024.0, "1024 tokens"),
        ("bytes", 3 * 2**30, "3 GiB"),
        ("bytes", 1536.0 * 2**10, "1536 KiB"),
        ("bytes", 1001.0, "1001 bytes"),
    ],
)
def test_budgets_are_written_exactly(unit, amount, text):
    assert formatting.budget(unit, amount) == text
