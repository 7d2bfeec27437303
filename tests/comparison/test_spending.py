import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.comparison.spending import Spending, learning_rate_factor

shares = st.floats(0, 2)
warmups = st.floats(0, 0.9)


@given(shares, warmups, st.sampled_from(["constant", "linear", "cosine"]))
def test_the_factor_rises_then_falls_within_zero_and_one(share, warmup, schedule):
    factor = learning_rate_factor(share, warmup, schedule)
    assert 0 <= factor <= 1
    if share < warmup:
        assert factor == share / warmup
    else:
        assert learning_rate_factor(share + 0.1, warmup, schedule) <= factor
    assert learning_rate_factor(warmup, warmup, schedule) == 1
    assert learning_rate_factor(1.5, warmup, schedule) == pytest.approx(
        1.0 if schedule == "constant" else 0.0, abs=1e-12
    )


def test_the_cosine_is_half_way_down_in_the_middle():
    assert learning_rate_factor(0.55, 0.1, "cosine") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("unit", "share"), [("steps", 0.2), ("flops", 1.4), ("tokens_seen", 0.8), ("tokens_trained", 0.4)]
)
def test_the_share_is_counted_in_the_unit_of_the_budget(unit, share):
    stats = {"labels": 8, "labels_trained": 4}
    spending = Spending({"unit": unit, "amount": 10}, lambda: 14, stats, torch.device("cpu"))
    spending.steps = 2
    assert spending.share == pytest.approx(share)
    assert getattr(spending.costs(), unit) == pytest.approx(share * 10)


def test_time_stands_still_in_a_pause():
    spending = Spending({"unit": "steps", "amount": 1}, lambda: 0, {}, torch.device("cpu"))
    assert spending.costs().wall_seconds == 0
    spending.resume()
    spending.pause()
    first = spending.seconds
    assert first > 0
    assert spending.seconds == first
    spending.resume()
    assert spending.seconds > first
