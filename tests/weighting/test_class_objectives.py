"""The classifiers' losses against official implementations, their limits and their gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tokenwise.errors import InputError
from tokenwise.weighting.class_margins import LDAM, LogitAdjustment
from tokenwise.weighting.class_overlap import ClassFocal, Dice
from tokenwise.weighting.class_weights import ClassBalanced, ClassUniform, InverseFrequency
from tokenwise.weighting.classification import ClassBatch

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "class_losses.json").read_text(encoding="utf-8"))
LOGITS = torch.tensor(GOLDEN["logits"], dtype=torch.float64)
LABELS = torch.tensor(GOLDEN["labels"])
MULTI = torch.tensor(GOLDEN["multi_labels"], dtype=torch.float64)
COUNTS = torch.tensor(GOLDEN["counts"], dtype=torch.float64)
ONE_LABEL = [
    ClassUniform(),
    ClassBalanced(),
    InverseFrequency(),
    LDAM(),
    LDAM(defer=0.0),
    LogitAdjustment(),
    Dice(),
    Dice(denominator="paper"),
    Dice(denominator="batch"),
    ClassFocal(),
]
SEVERAL_LABELS = [method for method in ONE_LABEL if method.multi_label]


def loss(method, logits, labels=LABELS, counts=COUNTS, progress=0.0):
    """The loss of one step."""
    losses = method.losses(ClassBatch(logits, labels, counts, progress=progress))
    return losses.sum() / method.divisors(labels, counts, progress).sum()


@pytest.mark.parametrize(
    ("name", "method", "labels", "counts", "factor"),
    [
        ("ldam", LDAM(scale=30.0), LABELS, COUNTS, 1),
        ("ldam_weighted", LDAM(scale=30.0, defer=0.0), LABELS, COUNTS, 1),
        ("focal", ClassFocal(), LABELS, COUNTS, 1),
        # balanced-loss divides the sum over all entries by the number of positive labels, we by that of the entries.
        ("focal_sigmoid", ClassFocal(), MULTI, COUNTS, MULTI.numel() / MULTI.sum().item()),
        ("class_balanced_examples", ClassBalanced(divide_by="examples"), LABELS, COUNTS, 1),
        ("class_balanced_weights", ClassBalanced(divide_by="weights"), LABELS, COUNTS, 1),
        ("dice_batch", Dice(denominator="batch"), LABELS, COUNTS, 1),
        ("dice_batch_plain", Dice(denominator="batch", alpha=0.0, smoothing=1e-4), LABELS, COUNTS, 1),
        ("dice_square", Dice(), LABELS, COUNTS, 1),
        (
            "transicd",
            LDAM(max_margin=GOLDEN["transicd"]["C"]),
            MULTI,
            torch.tensor(GOLDEN["transicd"]["counts"], dtype=torch.float64),
            1,
        ),
    ],
)
def test_official_implementations(name, method, labels, counts, factor):
    logits = LOGITS.clone().requires_grad_()
    found = loss(method, logits, labels, counts) * factor
    found.backward()
    assert found.item() == pytest.approx(GOLDEN[name]["loss"], rel=1e-9)
    torch.testing.assert_close(logits.grad, torch.tensor(GOLDEN[name]["gradient"], dtype=torch.float64))


def test_class_weights_are_those_of_the_official_code():
    torch.testing.assert_close(
        ClassBalanced(beta=GOLDEN["beta"]).class_weights(COUNTS),
        torch.tensor(GOLDEN["class_weights"], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    "method",
    [
        ClassUniform(),
        ClassBalanced(beta=0.0),
        InverseFrequency(power=0.0),
        LDAM(max_margin=0.0, scale=1.0),
        LogitAdjustment(tau=0.0),
        ClassFocal(gamma=0.0),
    ],
)
def test_neutral_fields_are_cross_entropy(method):
    torch.testing.assert_close(loss(method, LOGITS), F.cross_entropy(LOGITS, LABELS))
    if method.multi_label:
        torch.testing.assert_close(loss(method, LOGITS, MULTI), F.binary_cross_entropy_with_logits(LOGITS, MULTI))


@pytest.mark.parametrize("method", [ClassBalanced(), InverseFrequency(), LDAM(max_margin=0.0), LogitAdjustment()])
def test_equal_counts_are_cross_entropy(method):
    equal = torch.full((4,), 50, dtype=torch.float64)
    torch.testing.assert_close(loss(method, LOGITS, counts=equal, progress=1.0), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("method", ONE_LABEL, ids=repr)
def test_gradients(method):
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss(method, logits), logits)


@pytest.mark.parametrize("method", SEVERAL_LABELS, ids=repr)
def test_gradients_with_several_labels(method):
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss(method, logits, MULTI), logits)
    assert method.losses(ClassBatch(LOGITS, MULTI, COUNTS)).shape == (len(MULTI),)


def test_margins_ask_more_and_most_of_the_rarest():
    extra = LDAM().losses(ClassBatch(0 * LOGITS, LABELS, COUNTS)) - F.cross_entropy(
        0 * LOGITS, LABELS, reduction="none"
    )
    assert (extra > 0).all()
    order = COUNTS[LABELS].argsort()
    assert (extra[order].diff() <= 1e-12).all()


def test_class_weights_set_in_late():
    method = LDAM(defer=0.5)
    early, late = (loss(method, LOGITS, progress=progress) for progress in (0.49, 0.5))
    torch.testing.assert_close(early, loss(LDAM(defer=1.0), LOGITS, progress=1.0))
    torch.testing.assert_close(late, loss(LDAM(defer=0.0), LOGITS))
    assert abs(early - late) > 0.01


def test_logit_adjustment_is_cross_entropy_of_shifted_logits():
    shifted = LOGITS + (COUNTS / COUNTS.sum()).log()
    torch.testing.assert_close(loss(LogitAdjustment(), LOGITS), F.cross_entropy(shifted, LABELS))


@pytest.mark.parametrize("method", ONE_LABEL, ids=repr)
def test_no_example_gives_no_loss_and_no_error(method):
    assert method.losses(ClassBatch(LOGITS[:0], LABELS[:0], COUNTS)).shape == (0,)


def test_fields_are_checked():
    with pytest.raises(InputError, match=r"ClassBalanced.beta"):
        ClassBalanced(beta=1.0)
    with pytest.raises(InputError, match=r"Dice.denominator"):
        Dice(denominator="squared")
    with pytest.raises(InputError, match=r"LDAM.counts"):
        LDAM(counts=[5, -1])
    assert LDAM(counts=[5, 1]).spec()["ldam"]["counts"] == [5, 1]


def test_expected_weights_leave_a_step_without_rare_examples_small():
    counts, labels = torch.tensor([99.0, 1.0], dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    batch = ClassBatch(torch.zeros(4, 2, dtype=torch.float64), labels, counts)
    for divide_by, expected in (("expected_weights", 100 / 198), ("weights", 1.0), ("examples", 2 / 100)):
        method = InverseFrequency(divide_by=divide_by)
        found = method.losses(batch).sum() / method.divisors(labels, counts, 0.0).sum()
        assert found.item() == pytest.approx(expected * torch.tensor(2.0).log().item())
