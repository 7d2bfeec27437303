"""weigh on classifiers: the same update whatever the batch layout, evaluation, undo, checkpoints, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
from layouts import BERT, class_rows, classifier, make_trainer, train
from reference_steps import TOLERANCE, class_loss, class_step, distance, logits_and_labels, step
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting import class_training
from tokenwise.weighting.class_margins import LDAM, LogitAdjustment
from tokenwise.weighting.class_overlap import ClassFocal, Dice
from tokenwise.weighting.class_training import count_classes
from tokenwise.weighting.class_weights import ClassBalanced, ClassUniform, InverseFrequency
from tokenwise.weighting.classification import ClassBatch, ClassObjective
from tokenwise.weighting.storm import Storm

METHODS = {
    "uniform": ClassUniform(),
    "class_balanced": ClassBalanced(),
    "class_balanced examples": ClassBalanced(divide_by="examples"),
    "class_balanced weights": ClassBalanced(divide_by="weights"),
    "inverse_frequency": InverseFrequency(),
    "ldam": LDAM(),
    "ldam late": LDAM(defer=0.0),
    "logit_adjustment": LogitAdjustment(),
    "dice": Dice(),
    "focal": ClassFocal(),
}
KINDS = ("bert", "llama", "tokens", "several")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_every_layout_gives_the_update_of_the_fp64_reference(kind, name, tmp_path):
    method = METHODS[name]
    if kind == "several" and (not method.multi_label or name == "ldam late"):
        pytest.skip("knows one label per example")
    model, rows = classifier(kind), class_rows(kind)
    expected_loss, expected = class_step(model, rows, method)
    assert distance(model, expected) > 100 * TOLERANCE
    # Alone, the fourth text of tokens is a micro-batch without labels.
    for batch, accumulate in ((8, 1), (4, 2), (1, 8) if kind == "tokens" else (2, 4)):
        found, losses, handle = train(model, rows, method, tmp_path, batch, accumulate)
        assert distance(found, expected) < TOLERANCE, f"{batch} x {accumulate}"
        assert losses[0] == pytest.approx(expected_loss, abs=1e-6)
    plain = class_loss(ClassUniform(), *logits_and_labels(model, rows)).item()
    assert handle.stats["cross_entropy"] == pytest.approx(plain, abs=1e-6)
    assert handle.stats["examples"] == len(logits_and_labels(model, rows)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_is_the_stock_loss(kind, tmp_path):
    model, rows = classifier(kind), class_rows(kind)
    stock, stock_losses, _ = train(model, rows, None, tmp_path, steps=3)
    ours, losses, _ = train(model, rows, ClassUniform(), tmp_path, steps=3)
    assert losses == pytest.approx(stock_losses, abs=1e-6)
    assert distance(ours, stock) < TOLERANCE < distance(ours, model)


def test_dice_over_the_batch_depends_on_its_size_by_definition(tmp_path):
    model, rows = classifier("bert"), class_rows("bert")
    method = Dice(denominator="batch")
    assert distance(train(model, rows, method, tmp_path)[0], train(model, rows, method, tmp_path, 2, 4)[0]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_untouched_and_undo_puts_everything_back(kind, tmp_path):
    model, rows = classifier(kind), class_rows(kind)
    trainer = make_trainer(model, rows, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    model.train()
    training = model(**batch)
    # What accelerate and the callbacks keep is theirs.
    names, attributes = set(vars(model)), {k: v for k, v in vars(trainer).items() if k != "callback_handler"}
    callbacks = list(trainer.callback_handler.callbacks)
    with tw.weigh(trainer, ClassFocal()) as handle:
        during = model(**batch)
        assert torch.equal(during.logits, training.logits)
        assert during.loss < training.loss
        assert trainer.evaluate()["eval_loss"] == before
        model.train()
    handle.undo()
    after = model(**batch)
    assert torch.equal(after.loss, training.loss)
    assert torch.equal(after.logits, training.logits)
    assert set(vars(model)) == names
    assert {k: v for k, v in vars(trainer).items() if k != "callback_handler"} == attributes
    assert trainer.callback_handler.callbacks == callbacks


@pytest.mark.parametrize("name", ["ldam", "storm"])
def test_interrupted_and_resumed_equals_uninterrupted(name, tmp_path):
    method = {"ldam": LDAM(defer=0.6), "storm": Storm(learning_rate=0.05)}[name]
    model, rows = classifier("bert"), class_rows("bert", 24)
    whole, _, handle = train(model, rows, method, tmp_path / "whole", 2, 2, steps=5)
    options = {"save_strategy": "steps", "save_steps": 2}
    train(model, rows, method, tmp_path / "cut", 2, 2, steps=5, **options)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed, _, _ = train(model, rows, method, tmp_path / "cut", 2, 2, steps=5, resume=str(checkpoint))
    assert distance(whole, resumed) == 0
    assert handle.progress == 0.8
    never = LDAM(defer=1.0) if name == "ldam" else ClassUniform()
    assert distance(whole, train(model, rows, never, tmp_path / "other", 2, 2, steps=5)[0]) > TOLERANCE
    with pytest.raises(InputError, match=r"was trained with .* this run weighs with"):
        train(model, rows, ClassFocal(), tmp_path / "cut", 2, 2, steps=5, resume=str(checkpoint))


def test_a_batch_without_labels_is_a_differentiable_zero():
    model = classifier("tokens").train()
    rows = class_rows("tokens")
    for method in (ClassUniform(), ClassBalanced(counts=[5, 3, 1]), Dice(denominator="batch"), Storm()):
        with tw.weigh(model, method):
            loss = model(rows[3]["input_ids"][None], labels=rows[3]["labels"][None]).loss
        loss.backward()
        assert loss.item() == 0
        assert model.classifier.weight.grad.abs().sum() == 0


def test_a_loop_of_ones_own():
    model, rows = classifier("tokens").train(), class_rows("tokens")
    counts = logits_and_labels(model, rows)[1].bincount(minlength=3).tolist()
    _, expected = class_step(model, rows, ClassBalanced())
    with tw.weigh(model, ClassBalanced(counts=counts)) as handle:
        total = sum(handle.denominator(row["labels"]) for row in rows)
        for row in rows:
            inputs = {name: row[name][None] for name in row}
            model(**inputs, num_items_in_batch=total).loss.backward()
        assert handle.correct_gradients(total) == 1.0
    step(model)
    assert distance(model, expected) < TOLERANCE
    ldam = LDAM(counts=counts, defer=0.5)
    with tw.weigh(model, ldam) as handle:
        losses = []
        for handle.progress in (0.0, 0.5):
            losses.append(model(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss.item())
    assert losses[0] != losses[1]


def test_adapters_train(tmp_path):
    model, rows = classifier("llama"), class_rows("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    expected = class_loss(ClassFocal(), *logits_and_labels(wrapped.eval(), rows)).item()
    for method, loss in ((ClassFocal(), expected), (Storm(), None)):
        trained, losses, _ = train(wrapped, rows, method, tmp_path, 2, 4)
        assert loss is None or losses[0] == pytest.approx(loss, abs=1e-6)
        assert distance(trained, wrapped) > TOLERANCE


def test_classes_are_counted_in_every_kind_of_data():
    rows = [{"label": 0}, {"label": 2}, {"label": 0}]
    assert count_classes(rows, 3).tolist() == [2, 0, 1]
    assert count_classes(datasets.Dataset.from_list(rows), 3).tolist() == [2, 0, 1]
    tokens = datasets.Dataset.from_list([{"labels": [0, -100, 1]}, {"labels": [1]}]).with_format("torch")
    assert count_classes(tokens, 2).tolist() == [1, 2]
    assert count_classes(datasets.Dataset.from_list(rows).select([2, 1]), 3).tolist() == [1, 0, 1]
    several = [{"labels": torch.tensor([1.0, 0.0])}, {"labels": torch.tensor([1.0, 1.0])}]
    assert count_classes(several, 2, multi_label=True).tolist() == [2, 1]
    with pytest.raises(InputError, match="no column of labels, only text"):
        count_classes([{"text": "x"}], 2)
    with pytest.raises(InputError, match="label 2, the model classes 0 to 1"):
        count_classes(rows, 2)
    with pytest.raises(InputError, match=r"label 0\.5, the model"):
        count_classes([{"labels": 0.5}], 2)
    with pytest.raises(InputError, match="IterableDataset cannot be counted"):
        count_classes(datasets.Dataset.from_list(rows).to_iterable_dataset(), 3)


def test_a_data_set_of_many_rows_is_counted_whole(monkeypatch):
    monkeypatch.setattr(class_training, "_ROWS_AT_ONCE", 3)
    labels = [0, 2, 2, -100, -100, -100, 1, 0, 2, 0]
    dataset = datasets.Dataset.from_dict({"labels": labels})
    assert count_classes(dataset, 3).tolist() == [3, 1, 3]
    with pytest.raises(InputError, match="label 2, the model classes 0 to 1"):
        count_classes(dataset, 2)
    with pytest.raises(InputError, match="label None, the model"):
        count_classes(datasets.Dataset.from_dict({"labels": [*labels, None]}), 3)
    several = datasets.Dataset.from_dict({"labels": [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]})
    assert count_classes(several, 2, multi_label=True).tolist() == [3, 2]
    ragged = datasets.Dataset.from_dict({"labels": [[1.0, 0.0]] * 4 + [[1.0]]})
    with pytest.raises(InputError, match=r"shape \(1,\) for 2 classes"):
        count_classes(ragged, 2, multi_label=True)


class TwoLosses(ClassObjective):
    """Gives the wrong number of losses."""

    def losses(self, batch, state=None):
        return batch.nll()[:2]


class Largest(ClassObjective):
    """A method of one's own: only the largest loss counts."""

    def losses(self, batch: ClassBatch, state=None):
        nll = batch.nll()
        return torch.where(nll == nll.max(), nll, 0.0)


def test_a_method_of_ones_own(tmp_path):
    model, rows = classifier("bert"), class_rows("bert")
    _, losses, _ = train(model, rows, Largest(), tmp_path)
    assert losses[0] == pytest.approx(
        F.cross_entropy(*logits_and_labels(model, rows), reduction="none").max().item() / 8
    )
    with pytest.raises(InputError, match=r"TwoLosses.losses: gave shape \(2,\) for 8 examples"):
        train(model, rows, TwoLosses(), tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_patched(tiny_llama, tmp_path):
    model, rows = classifier("bert"), class_rows("bert")

    def refused(message, target, method):
        with pytest.raises(InputError, match=message):
            tw.weigh(target, method)
        assert "forward" not in vars(model)

    trainer = make_trainer(model, rows, tmp_path)
    refused("LlamaForCausalLM is no classifier", tiny_llama, ClassUniform())
    refused("ClassBalanced.counts: must be given", model, ClassBalanced())
    refused("has 2 numbers, the model has 3 classes", model, ClassBalanced(counts=[1, 2]))
    refused("class 1, 2 has no example", make_trainer(model, rows[:1], tmp_path), LDAM())
    refused("no column of labels", make_trainer(model, [{"input_ids": rows[0]["input_ids"]}], tmp_path), LDAM())
    refused("0.1 replaces the loss", make_trainer(model, rows, tmp_path, label_smoothing_factor=0.1), LDAM())
    refused("ClassBalanced knows one", classifier("several"), ClassBalanced(counts=[1, 2, 3]))
    one = BertForSequenceClassification(BertConfig(**{**BERT, "num_labels": 1}))
    refused("there are no classes to weigh", one, ClassUniform())
    handle = tw.weigh(trainer, ClassUniform())
    with pytest.raises(InputError, match="weighed already"):
        tw.weigh(trainer, ClassUniform())
    handle.undo()
    with tw.weigh(model.train(), ClassUniform()), pytest.raises(InputError, match="are no class indices"):
        model(rows[0]["input_ids"][None], labels=torch.tensor([[1.0, 0.0, 1.0]]))
    ignored = [{**row, "labels": torch.full((8,), -100)} for row in class_rows("tokens")]
    with pytest.raises(InputError, match="are all -100 in the first optimizer step"):
        train(classifier("tokens"), ignored, ClassUniform(), tmp_path)


PARALLEL = (("bert", "class_balanced"), ("tokens", "ldam late"), ("tokens", "focal"), ("several", "dice"))


def test_two_processes_give_the_update_of_one(tmp_path):
    script = Path(__file__).with_name("two_processes_classes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, name in PARALLEL:
        loss, expected = class_step(classifier(kind), class_rows(kind), METHODS[name])
        found = load_file(tmp_path / f"{kind} {name}.safetensors")
        assert found.pop("loss").item() == pytest.approx(loss, abs=1e-6)
        assert all((value - expected.state_dict()[key]).abs().max() < TOLERANCE for key, value in found.items())
    rescalers = [load_file(tmp_path / f"storm {rank}.safetensors") for rank in (0, 1)]
    for key, value in rescalers[0].items():
        if key.startswith("rescaler"):
            torch.testing.assert_close(value, rescalers[1][key])
