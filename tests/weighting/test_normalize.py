"""normalize="mean": the update of the sum over the sum of weights, whatever the method's reduction and the layout."""

from __future__ import annotations

import pytest
import torch
from layouts import packed, padded, sequences, train
from reference_steps import TOLERANCE, distance, step, weighted_step
from test_trainer import LAYOUTS, FocalSequenceMean
from transformers import Trainer, TrainingArguments

import tokenwise as tw
from tokenwise.errors import InputError


class Scaled(tw.weighting.TokenWeighter):
    """Probabilities of the labels as weights, times a factor."""

    reads = frozenset({"nll"})
    factor: float = 1.0

    def weights(self, batch, state=None):
        return self.factor * torch.exp(-batch.nll)


METHODS = {
    "token_mean": tw.DFT(),
    "nonzero_mean, whole step": tw.TopEntropy(keep=0.4, scope="step"),
    "sequence_mean": FocalSequenceMean(),
    "weights": Scaled(factor=0.01),
    "negative": Scaled(factor=-1.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_layout_gives_the_update_of_the_reference(name, tiny_llama, tmp_path):
    model, pairs, method = tiny_llama.double(), sequences(), METHODS[name]
    _, expected = weighted_step(model, pairs, method, normalize="mean")
    assert distance(expected, model) > 100 * TOLERANCE
    for layout, (batch, accumulate, kind) in LAYOUTS.items():
        rows = packed(pairs, 2) if kind == "packed" else padded(pairs, kind)
        found, _, handle = train(model, rows, method, tmp_path, batch, accumulate, normalize="mean")
        assert distance(found, expected) < TOLERANCE, layout
        assert handle.stats["effective_learning_rate"] == pytest.approx(1)


def test_the_scale_of_the_weights_no_longer_matters(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    one, *_ = train(tiny_llama.double(), rows, Scaled(factor=1.0), tmp_path, 2, 4, normalize="mean")
    ten, *_ = train(tiny_llama, rows, Scaled(factor=10.0), tmp_path, 2, 4, normalize="mean")
    smaller, _, handle = train(tiny_llama, rows, Scaled(factor=1.0), tmp_path, 2, 4)
    assert distance(one, ten) < TOLERANCE < distance(one, smaller)
    assert handle.stats["effective_learning_rate"] == pytest.approx(handle.stats["mean_weight"])
    uniform, *_ = train(tiny_llama, rows, tw.Uniform(), tmp_path, 2, 4, normalize="mean")
    plain, *_ = train(tiny_llama, rows, tw.Uniform(), tmp_path, 2, 4)
    assert distance(uniform, plain) < TOLERANCE


def test_a_loop_of_ones_own(tiny_llama):
    model = tiny_llama.double().train()
    pairs = [pair for index, pair in enumerate(sequences()) if index != 3]
    _, expected = weighted_step(model, pairs, tw.DFT(), normalize="mean")
    labels = sum(int((labels[1:] != -100).sum()) for _, labels in pairs)
    with tw.weigh(model, tw.DFT(), normalize="mean") as handle:
        for ids, targets in pairs:
            model(input_ids=ids[None], labels=targets[None], num_items_in_batch=labels).loss.backward()
        handle.correct_gradients(labels)
    step(model)
    assert distance(model, expected) < TOLERANCE


def test_a_checkpoint_knows_it_and_a_wrong_word_is_refused(tiny_llama, tmp_path):
    rows = padded(sequences(), "right")
    train(tiny_llama, rows, tw.DFT(), tmp_path, 2, 2, normalize="mean", save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    assert '"normalize": "mean"' in (checkpoint / "tokenwise_method.json").read_text(encoding="utf-8")
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, optim="sgd", max_steps=2)
    trainer = Trainer(tiny_llama, arguments, train_dataset=rows)
    with tw.weigh(trainer, tw.DFT()), pytest.raises(InputError, match=r"normalize.* this run weighs with"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with tw.weigh(trainer, tw.DFT(), normalize="mean"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(InputError, match=r"normalize: 'meen' is not known. Did you mean 'mean'\?"):
        tw.weigh(tiny_llama, tw.DFT(), normalize="meen")
