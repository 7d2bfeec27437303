from __future__ import annotations

import math

import pytest
from made_results import baseline, method, run, summary

from tokenwise.comparison.answer import conclude
from tokenwise.comparison.records import Costs, Job, Result


def test_a_proven_winner_is_named_with_its_price() -> None:
    results = [
        *baseline(),
        *method("random", 0.01, role="control", flops=0.9e12),
        *method("excess", -0.08, control="random", flops=1.05e12, reference_flops=0.26e12),
        *method("dynamic", 0.0001),
    ]
    found = conclude(results, summary())
    rows = {row.label: row for row in found.rows}
    assert found.winner == "excess"
    assert found.sentence.startswith(
        "Use excess: it lowers held-out loss against uniform by 0.078 nats/token (95% interval 0.05"
    )
    assert "does better than random, its random control" in found.sentence
    assert "at 1.31× the FLOPs" in found.sentence
    assert found.sentence.endswith("its reference included.")
    assert found.sentence.count(". ") == 0
    assert rows["excess"].verdict == "better"
    assert rows["excess"].relative_flops == pytest.approx(1.31)
    assert rows["excess"].reference_costs == Costs(0.26e12, 15.0, 2**29, 10, 10, 5)
    assert rows["excess"].settings == {"keep": 0.6}
    assert rows["dynamic"].verdict == "no difference"
    assert rows["uniform"].verdict == "baseline"
    assert rows["uniform"].spread == pytest.approx(0.02, rel=1)
    assert rows["random"].relative_flops == pytest.approx(0.9)
    assert found.compared == 2
    assert found.level == pytest.approx(0.975)
    assert any("97.5%" in note for note in found.notes)


def test_the_baseline_comes_first_and_the_rest_in_the_plan_s_order() -> None:
    results = [*method("b", 0.001), *method("a", 0.002), *baseline()]
    assert [row.label for row in conclude(results, summary()).rows] == ["uniform", "b", "a"]


def test_no_difference() -> None:
    found = conclude([*baseline(), *method("a", 0.0001), *method("b", -0.0002)], summary())
    assert found.winner is None
    assert found.sentence == "No difference shown between uniform, a and b."
    assert any("does not mean none" in note for note in found.notes)


def test_no_difference_of_one_method_gives_its_interval() -> None:
    found = conclude([*baseline(), *method("a", 0.0001)], summary())
    assert found.sentence.startswith("No difference shown between uniform and a (")
    assert "95% interval −" in found.sentence


def test_a_worse_method_is_named_as_such() -> None:
    found = conclude([*baseline(), *method("a", 0.0001), *method("b", 0.2)], summary())
    assert found.rows[2].verdict == "worse"
    assert found.sentence.startswith("No difference shown between uniform and a (")
    assert "; b (+0.199 nats/token)" in found.sentence
    assert found.sentence.endswith("is worse than uniform.")


def test_all_worse_means_the_baseline() -> None:
    found = conclude([*baseline(), *method("a", 0.1), *method("b", 0.2)], summary())
    assert found.winner is None
    assert found.sentence.startswith("Use uniform: a (+0.1")
    assert found.sentence.endswith("are worse.")


def test_not_better_than_random_choice() -> None:
    results = [*baseline(), *method("random", -0.08, role="control"), *method("a", -0.0801, control="random")]
    found = conclude(results, summary())
    assert found.winner is None
    assert found.rows[2].verdict == "better"
    assert not found.rows[2].beats_control
    assert found.sentence.startswith(
        "No difference shown between a and random, its random control, although a is 0.078"
    )


def test_worse_than_random_choice() -> None:
    results = [*baseline(), *method("random", -0.2, role="control"), *method("a", -0.08, control="random")]
    found = conclude(results, summary())
    assert found.winner is None
    assert "but random, its random control, is better still" in found.sentence


def test_a_control_that_failed_proves_nothing() -> None:
    results = [*baseline(), *method("random", None, role="control"), *method("a", -0.08, control="random")]
    found = conclude(results, summary())
    assert found.winner is None
    assert "could not be compared with random" in found.sentence


def test_a_control_that_is_missing_proves_nothing() -> None:
    found = conclude([*baseline(), *method("a", -0.08, control="random")], summary())
    assert found.winner is None
    assert "could not be compared with random" in found.sentence


def test_of_two_winners_told_apart_the_better_is_named() -> None:
    found = conclude([*baseline(), *method("a", -0.05), *method("b", -0.2)], summary())
    assert found.winner == "b"
    assert found.sentence.startswith("Use b: it lowers")
    assert "at the same FLOPs" in found.sentence


def test_of_tied_winners_the_cheaper_is_named() -> None:
    results = [*baseline(), *method("a", -0.1), *method("b", -0.1001, flops=1.0e12, reference_flops=0.5e12)]
    found = conclude(results, summary())
    assert found.winner == "a"
    assert found.sentence.startswith("Use a: it and b lower held-out loss against uniform (by 0.1")
    assert "no difference is shown between them, and it is the cheaper" in found.sentence
    assert "b at 1.50× the FLOPs" in found.sentence


def test_tied_winners_of_equal_cost_are_both_named() -> None:
    found = conclude([*baseline(), *method("a", -0.1), *method("b", -0.1001)], summary())
    assert found.sentence.startswith(("Use a or b: both lower", "Use b or a: both lower"))
    assert found.winner in ("a", "b")


def test_every_run_failed() -> None:
    found = conclude([*baseline(shift=None), *method("a", None)], summary())
    assert found.winner is None
    assert found.sentence == "No answer: every run failed (The loss became NaN at step 7)."
    assert [row.verdict for row in found.rows] == ["failed", "failed"]
    assert len(found.failures) == 6


def test_the_baseline_failed() -> None:
    found = conclude([*baseline(shift=None), *method("a", -0.5)], summary())
    assert found.winner is None
    assert found.sentence.startswith("No answer: no run of the baseline uniform finished (The loss became NaN")
    assert found.rows[1].verdict == "not comparable"
    assert found.rows[1].quality is not None
    assert found.rows[1].relative_flops is None


def test_a_candidate_failed_in_every_run() -> None:
    found = conclude([*baseline(), *method("a", None)], summary())
    assert found.sentence == "No answer: a failed in every run."
    both = conclude([*baseline(), *method("a", None), *method("b", 0.0001)], summary())
    assert both.sentence.endswith("; a failed in every run.")


def test_a_winner_that_sometimes_fails_is_told_of() -> None:
    results = [*baseline(5), *method("a", -0.2, 4), run("a", 4, None)]
    found = conclude(results, summary(5))
    assert found.winner == "a"
    assert found.sentence.endswith("though 1 of its 5 runs failed.")
    assert found.rows[1].finished == (0, 1, 2, 3)
    assert any("a 4 of 5" in note for note in found.notes)


def test_only_one_method() -> None:
    found = conclude(baseline(), summary())
    assert found.sentence.startswith("Nothing to choose from: uniform (")
    assert found.winner is None
    assert found.notes == ()


def test_nothing_ran() -> None:
    assert conclude([], summary()).sentence == "No answer: nothing has run."


def test_only_a_control_beside_the_baseline_is_compared() -> None:
    found = conclude([*baseline(), *method("random", -0.2, role="control")], summary())
    assert found.winner == "random"


def test_one_seed_is_said() -> None:
    found = conclude([*baseline(1), *method("a", -0.1, 1)], summary(1))
    assert found.winner == "a"
    assert found.sentence.endswith("(one seed: how far another would differ is not known).")
    assert found.rows[1].spread is None
    assert any("only the held-out documents are resampled" in note for note in found.notes)


def test_nan_quality_is_reported_and_never_wins() -> None:
    results = [*baseline(), *method("a", -0.5)]
    assert results[-1].quality is not None
    results[-1].quality.nll[3] = math.nan
    found = conclude(results, summary())
    row = found.rows[1]
    assert row.verdict == "not finite"
    assert row.quality is not None
    assert math.isnan(row.quality)
    assert row.versus_baseline is not None
    assert math.isnan(row.versus_baseline.high)
    assert found.winner is None
    assert found.sentence == "No answer: a ended with a loss that is not finite."


def test_nan_baseline_gives_no_answer() -> None:
    results = [*baseline(), *method("a", -0.5)]
    assert results[0].quality is not None
    results[0].quality.nll[0] = math.nan
    assert "not finite" in conclude(results, summary()).sentence


def test_costs_not_measured_stay_so() -> None:
    found = conclude([*baseline(), *method("a", -0.2, flops=None, seconds_comparable=False)], summary())
    assert found.rows[1].costs.flops is None
    assert found.rows[1].relative_flops is None
    assert found.rows[1].relative_seconds is None
    assert not found.seconds_comparable
    assert "at a cost in FLOPs that was not measured" in found.sentence


def test_a_failed_reference_is_among_the_failures() -> None:
    job = Job("reference", "clean", 0, {"uniform": {}}, "candidate", {}, {})
    found = conclude([Result(job, "failed", "Out of memory."), *baseline()], summary())
    assert [failure.label for failure in found.failures] == ["reference clean"]
    assert [row.label for row in found.rows] == ["uniform"]


def test_a_job_s_control_does_not_change_its_key() -> None:
    first, second = run("a", 0, 0.0, control="random").job, run("a", 0, 0.0).job
    assert first.key == second.key
