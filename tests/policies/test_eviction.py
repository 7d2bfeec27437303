"""Counts of layers that fall: the authors' steps, exact totals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.eviction import pyramid_counts


def authors_sizes(capacity, prompt, layers, window, beta):
    """Of each layer with its window, as the paper's code counts, before it rounds down."""
    beyond = capacity - window
    least = beyond / beta
    most = 2 * beyond - least
    if most >= prompt - window:
        most = prompt - window
        least = 2 * beyond - most
    return [most - layer * (most - least) / (layers - 1) + window for layer in range(layers)]


@pytest.mark.parametrize(
    ("count", "available", "layers", "window", "expected"),
    [
        (150, 300, 4, 64, [232, 177, 123, 68]),
        (2048, 4096, 4, 64, [3933, 2676, 1420, 163]),
        # kvpress counts the window beside the budget and falls back to 100 each here; the first case of the next line
        # is its worked example, where nothing is a window.
        (100, 1000, 4, 64, [134, 111, 89, 66]),
        (2048, 4096, 4, 0, [3994, 2697, 1399, 102]),
        # Most of the prompt: the first layer keeps it all.
        (225, 300, 4, 64, [300, 250, 200, 150]),
        (60, 300, 4, 64, [60] * 4),
        (300, 300, 4, 64, [300] * 4),
        (150, 300, 1, 64, [150]),
    ],
)
def test_a_pyramid_falls_by_the_authors_steps(count, available, layers, window, expected):
    found = pyramid_counts(count, available, layers, window, 20.0)
    assert found == expected
    if window < count < available and layers > 1:
        sizes = authors_sizes(count, available, layers, window, 20.0)
        assert all(abs(one - other) < 1 for one, other in zip(found, sizes, strict=True))


@given(st.data())
def test_a_pyramid_adds_up_never_rises_and_keeps_the_window(data):
    available = data.draw(st.integers(1, 500))
    count = data.draw(st.integers(1, available))
    window = data.draw(st.integers(0, count))
    layers = data.draw(st.integers(1, 40))
    found = pyramid_counts(count, available, layers, window, data.draw(st.floats(1.01, 50)))
    assert sum(found) == count * layers
    assert found == sorted(found, reverse=True)
    assert available >= found[0]
    assert found[-1] >= window
