from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.comparison import charts, figures
from tokenwise.comparison.charts import Box, Scale


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_round_inside_and_about_as_many_as_asked(low: float, span: float, count: int) -> None:
    high = low + span
    found = charts.ticks(low, high, count)
    assert len(found) <= count + 1
    slack = span * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= value <= high + slack for value in found)


def test_ticks_by_example() -> None:
    assert charts.ticks(2.71, 2.93, 5) == [2.75, 2.8, 2.85, 2.9]
    assert charts.tick_decimals([2.75, 2.8, 2.85, 2.9]) == 2
    assert charts.log_ticks(8e11, 2e14) == [1e12, 1e13, 1e14]


def test_scales() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12))
def test_spread_labels_keep_their_distance_order_and_bounds(wanted: list[float]) -> None:
    found = charts.spread(wanted, 14, 0, 300)
    ordered = sorted(found)
    assert all(b - a >= 14 - 1e-6 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-6
    assert ordered[-1] <= 300 + 1e-6
    for i, a in enumerate(wanted):
        assert all(found[i] < found[j] for j, b in enumerate(wanted) if a < b)


def test_spread_leaves_alone_what_does_not_touch() -> None:
    assert charts.spread([10, 100, 50], 14, 0, 200) == [10, 100, 50]


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300)), max_size=15))
def test_labels_never_overlap_nor_leave_the_area(anchors: list[tuple[float, float]]) -> None:
    area = Box(0, 0, 400, 300)
    labels = [f"method_{index}" for index in range(len(anchors))]
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors]
    placed = [box for box in charts.place_labels(anchors, labels, taken, area) if box is not None]
    assert all(box.within(area) for box in placed)
    assert not any(a.overlaps(b) for i, a in enumerate(placed) for b in placed[i + 1 :])
    assert not any(box.overlaps(other) for box in placed for other in taken)


def test_a_curve_is_interrupted_where_it_is_not_finite() -> None:
    assert 'd="M0 1M2 3L3 4"' in charts.path([(0, 1), (1, math.nan), (2, 3), (3, 4)], "curve")


def test_texts_are_escaped_and_shortened() -> None:
    assert "&lt;script&gt;" in charts.text(0, 0, "<script>")
    assert charts.shorten("short", 200) == "short"
    cut = charts.shorten("a_very_long_label_indeed", 60)
    assert cut.endswith("…")
    assert charts.text_width(cut) <= 60


def test_styles_differ_in_more_than_colour() -> None:
    labels = [("uniform", "baseline"), ("random", "control"), *[(f"m{index}", "candidate") for index in range(12)]]
    found = charts.styles(labels)
    assert len(set(found.values())) == 14
    assert found["m0"].shape != found["m1"].shape


def test_pareto_front() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (3.0, 2.2), (4.0, 1.0)]
    assert figures.pareto_front(points) == [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)]
