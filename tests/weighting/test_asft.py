"""Anchored supervised fine-tuning and DFT against LLaMA-Factory's losses, batch by batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_unlearning import Bigram

import tokenwise as tw
from tokenwise import catalog
from tokenwise.weighting.loss import weighted_linear_cross_entropy
from tokenwise.weighting.objective import ObjectiveForward

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llamafactory_asft.json").read_text(encoding="utf-8"))
ANCHORED = [case for case in GOLDEN["cases"] if case["method"] != "dft"]
ROWS = list(range(len(GOLDEN["input_ids"])))


def batch(rows):
    return {name: torch.tensor([GOLDEN[name][row] for row in rows]) for name in ("input_ids", "labels")}


def number_of_labels(rows):
    return int(batch(rows)["labels"][:, 1:].ne(-100).sum())


def forward(method):
    model = Bigram(GOLDEN["embedding"], GOLDEN["head"])
    reference = Bigram(GOLDEN["reference_embedding"], GOLDEN["reference_head"])
    return model, ObjectiveForward(model, method, reference)


def assert_gradients(model, embedding, head):
    for found, expected in ((model.embedding.grad, embedding), (model.head.weight.grad, head)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def tensors(case):
    return [torch.tensor(case[name], dtype=torch.float64) for name in ("embedding_gradient", "head_gradient")]


@pytest.mark.parametrize("case", ANCHORED, ids=lambda case: f"{case['method']['asft']} {case['rows']}")
def test_one_batch_equals_llama_factory(case):
    model, objective = forward(catalog.build(case["method"]))
    loss = objective(**batch(case["rows"])).loss
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=2e-6)
    assert_gradients(model, *tensors(case))


def test_accumulated_batches_weigh_their_averages_by_their_labels():
    """LLaMA-Factory adds the averages of the micro-batches; here they count by their labels, and make one average."""
    parts = [case for case in ANCHORED if case["rows"] != ROWS]
    assert sorted(row for case in parts for row in case["rows"]) == ROWS
    shares = [number_of_labels(case["rows"]) / number_of_labels(ROWS) for case in parts]
    assert shares[0] != pytest.approx(shares[1], abs=0.05)
    model, objective = forward(tw.ASFT(alpha=0.1))
    objective.begin_step([batch(case["rows"]) for case in parts])
    for case, share in zip(parts, shares, strict=True):
        loss = objective(**batch(case["rows"])).loss
        loss.backward()
        assert loss.item() == pytest.approx(share * case["loss"], abs=2e-6)
    averaged = [
        sum(share * part for share, part in zip(shares, gradients, strict=True))
        for gradients in zip(*map(tensors, parts), strict=True)
    ]
    assert_gradients(model, *averaged)
    whole = next(case for case in ANCHORED if case["rows"] == ROWS and case["method"]["asft"]["alpha"] == 0.1)
    assert_gradients(model, *tensors(whole))


def test_without_an_anchor_it_is_dft():
    (official,) = [case for case in GOLDEN["cases"] if case["method"] == "dft"]
    inputs = batch(ROWS)
    embedding, head = (torch.tensor(GOLDEN[name], requires_grad=True) for name in ("embedding", "head"))
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    loss = weighted_linear_cross_entropy(
        embedding[inputs["input_ids"]], head, targets, weights=tw.DFT(), denominator=GOLDEN["num_items"]
    )
    loss.backward()
    assert loss.item() == pytest.approx(official["loss"], abs=1e-6)
    for found, expected in zip((embedding.grad, head.grad), tensors(official), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    model, objective = forward(tw.ASFT(alpha=0.0))
    objective(**inputs).loss.backward()
    assert_gradients(model, *tensors(official))


def test_a_micro_batch_without_labels_adds_nothing():
    """Where LLaMA-Factory's average over no labels is not a number."""
    model, objective = forward(tw.ASFT())
    inputs = batch([0])
    loss = objective(**{**inputs, "labels": torch.full_like(inputs["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in (model.embedding, model.head.weight))
