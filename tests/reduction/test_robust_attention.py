"""TAP and ADL: the official numbers, and the loss read off a model as it runs."""

import json
from pathlib import Path

import pytest
import torch

import tokenwise as tw
from small_models import pictures, vision
from tokenwise.errors import InputError
from tokenwise.reduction import AttentionDiversity, TokenAwarePooling
from tokenwise.signals.attention_diversity import attention_similarity

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tapadl.json").read_text())


@pytest.mark.parametrize("threshold", [1, 2])
def test_the_similarity_is_the_official_one(threshold):
    attention = torch.tensor(GOLDEN["diversity"]["scores"]).softmax(3)
    # Two samples: the official code takes the mean over both.
    expected = GOLDEN["diversity"][f"loss_{threshold}"]
    assert float(attention_similarity(attention, threshold)) == pytest.approx(expected, abs=1e-5)


def test_equal_rows_give_one_and_disjoint_ones_little():
    row = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0])
    assert float(attention_similarity(row.expand(1, 1, 9, 9))) == pytest.approx(1)
    assert float(attention_similarity(torch.eye(9)[None, None], threshold=0.5)) == pytest.approx(1 / 3)


def test_pooling_is_the_official_one():
    case = GOLDEN["pooling"]
    module = TokenAwarePooling(2, scales=3, temperature=case["temperature"]).eval()
    with torch.no_grad():
        module.choice[0].weight.copy_(torch.tensor(case["first"]))
        module.choice[2].weight.copy_(torch.tensor(case["second"]))
    assert torch.allclose(module(torch.tensor(case["x"])), torch.tensor(case["output"]), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_the_loss_of_a_model_is_that_of_its_maps(kind):
    model, images = vision(kind), pictures()
    dense = model(pixel_values=images).last_hidden_state
    with AttentionDiversity(model, threshold=0.5) as handle:
        assert torch.equal(model(pixel_values=images).last_hidden_state, dense)
        loss = handle.loss()
        with pytest.raises(InputError, match="has not run since the last loss"):
            handle.loss()
    eager = vision(kind, attention="eager")
    maps = eager(pixel_values=images, output_attentions=True).attentions
    expected = torch.stack([attention_similarity(attention, 0.5) for attention in maps]).mean()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert loss > 0.1
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "q_proj" in n)
    with tw.reduce(model, tw.ToMe(keep=0.5)), AttentionDiversity(model, threshold=0.5) as handle:
        model(pixel_values=images)
        assert 0 < handle.loss() < 1
