"""What `example_weights` says of classifiers' methods, on worked numbers and against autograd."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.example_weights import example_weights

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
COUNTS = [90, 9, 1]


def make_model(**options):
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, num_labels=3, initializer_range=0.5, **options)
    return BertForSequenceClassification(config).double().eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(1, 40, (5, 7), generator=generator), "labels": torch.tensor([0, 0, 1, 2, 0])}


def probabilities(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits.softmax(1)


def test_class_weights_are_what_they_say(batch):
    found = example_weights(make_model(), tw.weighting.InverseFrequency(counts=COUNTS), batch)
    # 1/90 : 1/9 : 1, scaled to a mean of 1.
    inverse = torch.tensor([1 / 90, 1 / 9, 1.0], dtype=torch.float64)
    expected = (3 * inverse / inverse.sum())[batch["labels"]]
    assert found.weights == pytest.approx(expected.tolist())
    assert found.losses == pytest.approx([w * loss for w, loss in zip(expected.tolist(), found.nll, strict=True)])


def test_plain_cross_entropy_weighs_one(batch):
    model = make_model().train()
    found = example_weights(model, tw.weighting.ClassUniform(), batch)
    assert found.weights == pytest.approx([1.0] * 5)
    assert found.nll == pytest.approx(
        torch.nn.functional.cross_entropy(
            make_model()(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none"
        ).tolist()
    )
    assert all(module.training for module in model.modules())


def test_focal_is_the_derivative_of_its_loss(batch):
    model = make_model()
    found = example_weights(model, tw.weighting.ClassFocal(gamma=2.0), batch)
    p = probabilities(model, batch)[torch.arange(5), batch["labels"]]
    expected = (1 - p) ** 2 - 2 * p * (1 - p) * p.log()
    assert found.weights == pytest.approx(expected.tolist())


def test_logit_adjustment_moves_the_gradient(batch):
    model = make_model()
    found = example_weights(model, tw.LogitAdjustment(counts=COUNTS), batch)
    plain = probabilities(model, batch)
    adjusted = plain * torch.tensor(COUNTS)
    adjusted /= adjusted.sum(1, keepdim=True)
    own = torch.nn.functional.one_hot(batch["labels"], 3)
    expected = (adjusted - own).norm(dim=1) / (plain - own).norm(dim=1)
    assert found.weights == pytest.approx(expected.tolist())
    assert found.weights[3] > 1 > found.weights[0]


def test_ldam_weighs_classes_late_in_training(batch):
    method = tw.weighting.LDAM(counts=COUNTS, max_margin=0.0, defer=0.5)
    early, late = (example_weights(make_model(), method, batch, progress=share).weights for share in (0.4, 0.5))
    assert early == pytest.approx([1.0] * 5)
    assert late == pytest.approx(
        example_weights(make_model(), tw.weighting.ClassBalanced(counts=COUNTS), batch).weights
    )


def test_several_labels(batch):
    model = make_model(problem_type="multi_label_classification")
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]).double()
    found = example_weights(model, tw.weighting.ClassUniform(), {**batch, "labels": labels})
    assert found.weights == pytest.approx([1.0] * 5)


def test_storm_begins_as_its_network_does_and_goes_on_with_its_state(batch):
    from tokenwise.weighting.base import Run

    model, method = make_model(), tw.weighting.Storm(learning_rate=0.1)
    fresh = example_weights(model, method, batch).weights
    assert sum(fresh) == pytest.approx(5)
    state = method.start(Run(0))
    assert example_weights(model, method, batch, state=state).weights == pytest.approx(fresh)
    assert example_weights(model, method, batch, state=state).weights != pytest.approx(fresh)


def test_a_certain_example_has_digits_and_an_impossible_ratio_none(batch):
    model = make_model()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([30.0, 0.0, 0.0]))
    found = example_weights(model, tw.weighting.InverseFrequency(counts=[1, 1, 2]), batch)
    assert found.weights == pytest.approx([1.2, 1.2, 1.2, 0.6, 1.2])
    with torch.no_grad():
        model.classifier.bias[0] = 1000.0
    assert example_weights(model, tw.weighting.ClassUniform(), batch).weights[0] is None


def test_refusals(batch):
    with pytest.raises(InputError, match=r"LogitAdjustment.counts"):
        example_weights(make_model(), tw.LogitAdjustment(), batch)
    with pytest.raises(InputError, match=r"batch.labels: is missing"):
        example_weights(make_model(), tw.weighting.ClassUniform(), {"input_ids": batch["input_ids"]})
    with pytest.raises(InputError, match=r"progress: 2"):
        example_weights(make_model(), tw.weighting.ClassUniform(), batch, progress=2)
