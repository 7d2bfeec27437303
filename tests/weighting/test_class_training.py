"""weigh on classifiers: the same update whatever the batch layout, evaluation, undo, checkpoints, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting import class_training
from tokenwise.weighting.class_margins import LDAM, LogitAdjustment
from tokenwise.weighting.class_overlap import ClassFocal, Dice
from tokenwise.weighting.class_training import count_classes
from tokenwise.weighting.class_weights import ClassBalanced, ClassUniform, InverseFrequency
from tokenwise.weighting.classification import ClassBatch, ClassObjective
from tokenwise.weighting.storm import Storm

# The models are fp64, but transformers' RMSNorm and rotary embedding compute in fp32 whatever the model's type.
TOLERANCE = 1e-6
SHARED = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_labels": 3}
BERT = {**SHARED, "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SHARED, "num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}


def make_model(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(LlamaConfig(**LLAMA)).double()
    if kind == "tokens":
        return BertForTokenClassification(BertConfig(**BERT)).double()
    if kind == "several":
        return BertForSequenceClassification(BertConfig(**BERT, problem_type="multi_label_classification")).double()
    return BertForSequenceClassification(BertConfig(**BERT)).double()


def make_rows(kind, count=8):
    """Texts of unequal class frequencies; of tokens the fourth text has no label, the others some."""
    generator = torch.Generator().manual_seed(0)
    labels = [0, 0, 1, 0, 2, 0, 1, 0] * (count // 8)
    rows = []
    for index, label in enumerate(labels):
        length = 4 + index % 5
        ids = torch.randint(1, 40, (length,), generator=generator)
        row = {"input_ids": F.pad(ids, (0, 8 - length)), "attention_mask": F.pad(torch.ones_like(ids), (0, 8 - length))}
        if kind == "tokens":
            label = torch.where(ids < 28, 0, torch.where(ids < 35, 1, 2))
            label[: index % 3 if index != 3 else length] = -100
            label = F.pad(label, (0, 8 - length), value=-100)
        elif kind == "several":
            label = torch.tensor([1.0, float(index % 2), float(index == 4)])
        rows.append({**row, "labels": label})
    return rows


def make_trainer(model, rows, folder, batch=8, accumulate=1, steps=1, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        seed=3,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def train(model, rows, method, folder, batch=8, accumulate=1, steps=1, resume=None, **options):
    model = copy.deepcopy(model)
    trainer = make_trainer(model, rows, folder, batch, accumulate, steps, **options)
    handle = tw.weigh(trainer, method) if method is not None else None
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], handle


def logits_and_labels(model, rows):
    logits = model(
        torch.stack([row["input_ids"] for row in rows]), torch.stack([row["attention_mask"] for row in rows])
    ).logits
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    if labels.is_floating_point():
        return logits, labels
    kept = labels.reshape(-1) != -100
    return logits.reshape(-1, logits.shape[-1])[kept], labels.reshape(-1)[kept]


def reference_loss(name, logits, labels):
    """The loss of a step, written out."""
    if labels.dim() == 2:
        counts = labels.sum(0)
        bce = F.binary_cross_entropy_with_logits
        return {
            "uniform": lambda: bce(logits, labels),
            "ldam": lambda: bce(logits - labels * 0.5 / counts.clamp_min(1) ** 0.25, labels),
            "dice": lambda: _square_dice(logits.sigmoid(), labels),
            "focal": lambda: ((labels - logits.sigmoid()).abs() ** 2 * bce(logits, labels, reduction="none")).mean(),
        }[name]()
    counts = labels.bincount(minlength=3).double()
    balanced = (1 - 0.9999) / (1 - 0.9999**counts)
    margins = 0.5 * (counts / counts.min()) ** -0.25
    nll = F.cross_entropy(logits, labels, reduction="none")
    return {
        "uniform": lambda: nll.mean(),
        # The data are one batch: what is expected of as many examples is what they have.
        "class_balanced": lambda: F.cross_entropy(logits, labels, balanced),
        "class_balanced weights": lambda: F.cross_entropy(logits, labels, balanced),
        "class_balanced examples": lambda: (balanced / balanced.mean())[labels].mul(nll).mean(),
        "inverse_frequency": lambda: F.cross_entropy(logits, labels, 1 / counts),
        "ldam": lambda: F.cross_entropy(logits - F.one_hot(labels, 3) * margins, labels),
        "ldam late": lambda: F.cross_entropy(logits - F.one_hot(labels, 3) * margins, labels, balanced),
        "logit_adjustment": lambda: F.cross_entropy(logits + (counts / counts.sum()).log(), labels),
        "dice": lambda: _square_dice(logits.softmax(1), F.one_hot(labels, 3)),
        "focal": lambda: ((1 - torch.exp(-nll)) ** 2 * nll).mean(),
    }[name]()


def _square_dice(p, y):
    damped = (1 - p) ** 0.01 * p
    return (1 - (2 * damped * y + 1) / (damped**2 + y + 1)).sum(1).mean()


def reference_step(model, rows, name):
    model = copy.deepcopy(model)
    loss = reference_loss(name, *logits_and_labels(model, rows))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    return loss.item(), model


def distance(one, other):
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


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
    model, rows = make_model(kind), make_rows(kind)
    expected_loss, expected = reference_step(model, rows, name)
    assert distance(model, expected) > 100 * TOLERANCE
    # Alone, the fourth text of tokens is a micro-batch without labels.
    for batch, accumulate in ((8, 1), (4, 2), (1, 8) if kind == "tokens" else (2, 4)):
        found, losses, handle = train(model, rows, method, tmp_path, batch, accumulate)
        assert distance(found, expected) < TOLERANCE, f"{batch} x {accumulate}"
        assert losses[0] == pytest.approx(expected_loss, abs=1e-6)
    plain = reference_loss("uniform", *logits_and_labels(model, rows)).item()
    assert handle.stats["cross_entropy"] == pytest.approx(plain, abs=1e-6)
    assert handle.stats["examples"] == len(logits_and_labels(model, rows)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_is_the_stock_loss(kind, tmp_path):
    model, rows = make_model(kind), make_rows(kind)
    stock, stock_losses, _ = train(model, rows, None, tmp_path, steps=3)
    ours, losses, _ = train(model, rows, ClassUniform(), tmp_path, steps=3)
    assert losses == pytest.approx(stock_losses, abs=1e-6)
    assert distance(ours, stock) < TOLERANCE < distance(ours, model)


def test_dice_over_the_batch_depends_on_its_size_by_definition(tmp_path):
    model, rows = make_model("bert"), make_rows("bert")
    method = Dice(denominator="batch")
    assert distance(train(model, rows, method, tmp_path)[0], train(model, rows, method, tmp_path, 2, 4)[0]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_untouched_and_undo_puts_everything_back(kind, tmp_path):
    model, rows = make_model(kind), make_rows(kind)
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
    model, rows = make_model("bert"), make_rows("bert", 24)
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
    model = make_model("tokens").train()
    rows = make_rows("tokens")
    for method in (ClassUniform(), ClassBalanced(counts=[5, 3, 1]), Dice(denominator="batch"), Storm()):
        with tw.weigh(model, method):
            loss = model(rows[3]["input_ids"][None], labels=rows[3]["labels"][None]).loss
        loss.backward()
        assert loss.item() == 0
        assert model.classifier.weight.grad.abs().sum() == 0


def test_a_loop_of_ones_own():
    model, rows = make_model("tokens").train(), make_rows("tokens")
    counts = logits_and_labels(model, rows)[1].bincount(minlength=3).tolist()
    _, expected = reference_step(model, rows, "class_balanced")
    with tw.weigh(model, ClassBalanced(counts=counts)) as handle:
        total = sum(handle.denominator(row["labels"]) for row in rows)
        for row in rows:
            inputs = {name: row[name][None] for name in row}
            model(**inputs, num_items_in_batch=total).loss.backward()
        assert handle.correct_gradients(total) == 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    assert distance(model, expected) < TOLERANCE
    ldam = LDAM(counts=counts, defer=0.5)
    with tw.weigh(model, ldam) as handle:
        losses = []
        for handle.progress in (0.0, 0.5):
            losses.append(model(rows[0]["input_ids"][None], labels=rows[0]["labels"][None]).loss.item())
    assert losses[0] != losses[1]


def test_adapters_train(tmp_path):
    model, rows = make_model("llama"), make_rows("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    expected = reference_loss("focal", *logits_and_labels(wrapped.eval(), rows)).item()
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
    model, rows = make_model("bert"), make_rows("bert")
    _, losses, _ = train(model, rows, Largest(), tmp_path)
    assert losses[0] == pytest.approx(
        F.cross_entropy(*logits_and_labels(model, rows), reduction="none").max().item() / 8
    )
    with pytest.raises(InputError, match=r"TwoLosses.losses: gave shape \(2,\) for 8 examples"):
        train(model, rows, TwoLosses(), tmp_path)


def test_what_cannot_work_is_refused_before_anything_is_patched(tiny_llama, tmp_path):
    model, rows = make_model("bert"), make_rows("bert")

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
    refused("ClassBalanced knows one", make_model("several"), ClassBalanced(counts=[1, 2, 3]))
    one = BertForSequenceClassification(BertConfig(**{**BERT, "num_labels": 1}))
    refused("there are no classes to weigh", one, ClassUniform())
    handle = tw.weigh(trainer, ClassUniform())
    with pytest.raises(InputError, match="weighed already"):
        tw.weigh(trainer, ClassUniform())
    handle.undo()
    with tw.weigh(model.train(), ClassUniform()), pytest.raises(InputError, match="are no class indices"):
        model(rows[0]["input_ids"][None], labels=torch.tensor([[1.0, 0.0, 1.0]]))
    ignored = [{**row, "labels": torch.full((8,), -100)} for row in make_rows("tokens")]
    with pytest.raises(InputError, match="are all -100 in the first optimizer step"):
        train(make_model("tokens"), ignored, ClassUniform(), tmp_path)


PARALLEL = (("bert", "class_balanced"), ("tokens", "ldam late"), ("tokens", "focal"), ("several", "dice"))


def test_two_processes_give_the_update_of_one(tmp_path):
    script = Path(__file__).with_name("two_processes_classes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, name in PARALLEL:
        loss, expected = reference_step(make_model(kind), make_rows(kind), name)
        found = load_file(tmp_path / f"{kind} {name}.safetensors")
        assert found.pop("loss").item() == pytest.approx(loss, abs=1e-6)
        assert all((value - expected.state_dict()[key]).abs().max() < TOLERANCE for key, value in found.items())
    rescalers = [load_file(tmp_path / f"storm {rank}.safetensors") for rank in (0, 1)]
    for key, value in rescalers[0].items():
        if key.startswith("rescaler"):
            torch.testing.assert_close(value, rescalers[1][key])
