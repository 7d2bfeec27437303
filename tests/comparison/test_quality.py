import math
from dataclasses import asdict

import numpy as np
import pytest

from tokenwise.comparison.answer import conclude
from tokenwise.comparison.quality import (
    ACCURACY,
    EXACT_MATCH,
    F1,
    FORGET_PROBABILITY,
    LOG_LOSS,
    MACRO_F1,
    RECALL,
    RESPONSE_LOSS,
    RETAIN_LOSS,
    RETAIN_PROBABILITY,
    ClassQuality,
    ResponseQuality,
    TextLoss,
    UnlearningQuality,
    read_quality,
)
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.statistics import difference

NAMES = ["common", "rare"]


def classes(labels, predictions):
    return ClassQuality(list(labels), list(predictions), [0.5] * len(labels), NAMES)


def test_classes_are_judged_one_by_one():
    # 8 common, 2 rare; one common and one rare are wrong.
    found = classes([0] * 8 + [1] * 2, [0] * 7 + [1] + [1, 0])
    assert found.value == pytest.approx((12.5 + 50) / 2)
    assert found.details[ACCURACY] == pytest.approx(80)
    assert found.details[LOG_LOSS] == 0.5
    assert found.groups["rare"] == {RECALL: pytest.approx(50), F1: pytest.approx(50)}
    assert found.groups["common"] == {RECALL: pytest.approx(87.5), F1: pytest.approx(100 * 14 / 16)}
    assert found.details[MACRO_F1] == pytest.approx((50 + 87.5) / 2)
    assert found.held_out == "10 examples of 2 classes, 2 of the rarest"


def test_a_class_that_is_never_predicted_has_no_f1():
    assert classes([0, 0, 1], [0, 0, 0]).groups["rare"] == {RECALL: 0.0, F1: 0.0}


def test_the_interval_of_the_macro_averaged_error_is_that_of_stratified_draws():
    labels = np.array([0] * 400 + [1] * 30)
    generator = np.random.default_rng(3)
    run = classes(labels, np.where(generator.random(430) < 0.2, 1 - labels, labels))
    other = classes(labels, np.where(generator.random(430) < 0.3, 1 - labels, labels))
    found = difference({0: run}, {0: other})
    change = 100.0 * (np.not_equal(run.predictions, labels) * 1.0 - np.not_equal(other.predictions, labels))
    error = np.sqrt(sum(change[labels == c].var() / (labels == c).sum() for c in (0, 1))) / 2
    assert found.mean == pytest.approx(run.value - other.value)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_one_rare_example_never_vanishes_from_a_draw():
    labels = [0] * 30 + [1]
    found = difference({0: classes(labels, [0] * 31)}, {0: classes(labels, labels)})
    assert (found.mean, found.low, found.high) == (50, 50, 50)


def test_responses_rank_by_loss_or_by_wrong_answers():
    fields = {"nll": [2.0, 4.0, 6.0], "tokens": [1, 2, 3], "correct": [True, False, False]}
    loss, match = ResponseQuality(**fields), ResponseQuality(**fields, metric="exact_match")
    assert loss.value == pytest.approx(2.0)
    assert loss.details == {EXACT_MATCH: pytest.approx(100 / 3)}
    assert match.value == pytest.approx(200 / 3)
    assert match.details[RESPONSE_LOSS] == pytest.approx(2.0)
    assert match.measure.name == "wrong answers"


def unlearnt(forget, retain):
    """Answers of two tokens with these probabilities (the geometric mean over both)."""
    nll = [-2 * math.log(probability) if probability else 2000.0 for probability in (*forget, *retain)]
    return UnlearningQuality(nll, [2] * len(nll), [True] * len(forget) + [False] * len(retain))


def test_forgetting_and_keeping_count_the_same():
    found = unlearnt([0.1, 0.3], [0.5, 0.7])
    assert found.value == pytest.approx(100 * (1 - 2 * 0.8 * 0.6 / 1.4))
    assert found.details[FORGET_PROBABILITY] == pytest.approx(20)
    assert found.details[RETAIN_PROBABILITY] == pytest.approx(60)
    assert found.details[RETAIN_LOSS] == pytest.approx(-math.log(0.5 * 0.7) / 2)
    assert found.held_out == "2 answers to forget and 2 to keep"
    assert unlearnt([0.0], [1.0]).value == pytest.approx(0)
    for nothing_gained in (unlearnt([1.0], [1.0]), unlearnt([0.0], [0.0]), unlearnt([1.0], [0.0])):
        assert nothing_gained.value == 100
    assert not UnlearningQuality([math.inf, 1.0], [1, 1], [True, False]).finite


def test_answers_are_drawn_anew_within_what_is_to_be_forgotten_and_kept():
    generator = np.random.default_rng(1)
    one = unlearnt(generator.uniform(0.1, 0.4, 50), generator.uniform(0.6, 0.9, 200))
    two = unlearnt([0.5] * 50, [0.5] * 200)
    found = difference({0: one}, {0: two})
    p = np.exp(-np.array(one.nll) / 2)
    forgotten, kept = 1 - p[:50].mean(), p[50:].mean()
    slopes = 200 * np.array([kept, forgotten]) ** 2 / (forgotten + kept) ** 2
    error = np.hypot(slopes[0] * p[:50].std() / np.sqrt(50), slopes[1] * p[50:].std() / np.sqrt(200))
    assert found.mean == pytest.approx(one.value - 50)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


@pytest.mark.parametrize(
    "quality",
    [
        TextLoss([1.0], [2], [3]),
        ResponseQuality([1.0], [1], [True], "exact_match"),
        classes([0, 1], [1, 1]),
        UnlearningQuality([1.0, 2.0], [1, 2], [True, False]),
    ],
)
def test_plain_values_and_back(quality):
    assert read_quality(asdict(quality)) == quality


def test_results_of_before_there_were_other_tasks_are_read():
    assert read_quality({"nll": [1.0], "tokens": [2], "bytes": [3]}) == TextLoss([1.0], [2], [3])


def test_a_loss_that_is_not_finite_gives_no_interval_although_the_error_is_finite():
    bad = ClassQuality([0, 1], [0, 1], [float("nan"), 0.0], NAMES)
    assert not difference({0: bad}, {0: classes([0, 1], [0, 1])}).finite


def test_the_answer_speaks_of_the_tasks_own_measure():
    labels = [0] * 100 + [1] * 40

    def result(label, wrong, role="candidate"):
        job = Job("run", label, 0, {label: {}}, role, {}, {})
        return Result(job, "finished", quality=classes(labels, [0] * 100 + [0] * wrong + [1] * (40 - wrong)))

    found = conclude([result("uniform", 30, "baseline"), result("focal", 4)], {"baseline": "uniform", "seeds": [0]})
    assert found.sentence.startswith("Use focal: it lowers macro-averaged error against uniform by 32.")
    assert "percentage points" in found.sentence
    assert found.rows[1].groups["rare"][RECALL] == pytest.approx(90)
    few = conclude([result("uniform", 30, "baseline"), result("focal", 30)], {"baseline": "uniform", "seeds": [0]})
    assert "No difference shown" in few.sentence
