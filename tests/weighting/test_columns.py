"""Columns of the data through the collators of transformers, on transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.columns import ColumnCollator, check_columns


def tokenizer(side):
    words = {f"w{index}": index for index in range(63)} | {"<pad>": 63}
    model = models.WordLevel(words, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>", padding_side=side)


def rows(labels=True):
    """Weights say which token they belong to."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in (5, 9, 3, 9, 1, 6):
        ids = torch.randint(1, 60, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "loss_weights": [float(token) for token in ids]})
        if labels:
            found[-1]["labels"] = ids
    return found


COLLATORS = {
    "language modeling": lambda side: (DataCollatorForLanguageModeling(tokenizer(side), mlm=False), False),
    "sequence to sequence": lambda side: (DataCollatorForSeq2Seq(tokenizer(side)), True),
    "flattening": lambda side: (DataCollatorWithFlattening(), True),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", COLLATORS)
def test_values_follow_their_tokens(name, side):
    plain, labels = COLLATORS[name](side)
    collator = ColumnCollator(plain, ["loss_weights", "sample_id"])
    batch = collator([{**row, "sample_id": index} for index, row in enumerate(rows(labels))])
    expected = plain([{key: row[key] for key in row if key != "loss_weights"} for row in rows(labels)])
    assert torch.equal(batch["labels"], expected["labels"])
    kept = batch["labels"] != -100
    assert torch.equal(batch["loss_weights"][kept], batch["input_ids"][kept].float())
    assert batch["loss_weights"].count_nonzero() == sum(len(row["input_ids"]) for row in rows())
    assert batch["sample_id"].dtype == torch.int64
    assert set(batch["sample_id"][batch["loss_weights"] != 0].tolist()) == set(range(6))


def test_a_collator_that_changes_tokens_is_refused():
    masking = ColumnCollator(DataCollatorForSeq2Seq(tokenizer("right")), ["loss_weights"])
    masking.collator = lambda features: {"input_ids": torch.zeros(len(features), 9, dtype=torch.long)}
    with pytest.raises(InputError, match="data_collator: changes the tokens"):
        masking(rows())


@pytest.mark.parametrize("kind", ["data set", "list", "stream"])
def test_the_trainer_trains_on_the_column(kind, tiny_llama, tmp_path):
    data = rows(labels=False)
    for index, row in enumerate(data):
        row["loss_weights"] = [float(index % 2)] * len(row["input_ids"])
    # Where padding precedes it, even the first token is predicted.
    expected = sum(len(row["input_ids"]) - (len(row["input_ids"]) == 9) for row in data[1::2])
    source = {
        "data set": lambda: Dataset.from_list(data),
        "list": lambda: data,
        "stream": lambda: IterableDataset.from_generator(lambda: iter(data)),
    }[kind]()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=6, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer("left"), mlm=False)
    trainer = Trainer(tiny_llama, arguments, train_dataset=source, eval_dataset=source, data_collator=collator)
    before = trainer.evaluate()["eval_loss"]
    handle = tw.weigh(trainer, tw.LossWeights())
    assert trainer.evaluate()["eval_loss"] == before
    trainer.train()
    assert handle.stats["labels_trained"] == expected
    handle.undo()
    assert trainer.data_collator is collator

    data[2]["loss_weights"] = [1.0, float("inf"), 1.0]
    source = Dataset.from_list(data) if kind == "data set" else source
    trainer = Trainer(tiny_llama, arguments, train_dataset=source, data_collator=collator)
    wrong = pytest.raises(InputError, match=r"train_dataset\[2\].loss_weights\[1\]: is inf")
    if kind != "stream":
        with wrong:
            tw.weigh(trainer, tw.LossWeights())
        return
    tw.weigh(trainer, tw.LossWeights())
    with wrong:
        trainer.train()


def test_a_first_token_without_value_is_refused_only_behind_padding():
    data = [{**row, "loss_weights": [None, *row["loss_weights"][1:]]} for row in rows()]
    ColumnCollator(DataCollatorForSeq2Seq(tokenizer("right")), ["loss_weights"])(data)
    with pytest.raises(InputError, match="loss_weights: has no value at the first token of a row padded on the left"):
        ColumnCollator(DataCollatorForSeq2Seq(tokenizer("left")), ["loss_weights"])(data)


def test_values_are_checked_only_where_they_are_read():
    row = {"input_ids": [1, 2, 3], "labels": [1, -100, 3], "loss_weights": [float("nan"), -1.0, 1.0]}
    good = {"input_ids": [1], "labels": [1], "loss_weights": [None]}
    for data in ([row, good], Dataset.from_list([row, good])):
        check_columns(data, ["loss_weights"], negative=False)
        with pytest.raises(InputError, match=r"train_dataset\[0\].loss_weights\[0\]: is nan"):
            check_columns(data, ["loss_weights"], negative=False, first_is_read=True)
