"""Token cleaning against the official selection, in training and on a data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from layouts import padded, sequences, train
from reference_steps import distance

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.token_cleaning import clean_tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "token_cleaning.json").read_text(encoding="utf-8"))
COLUMNS = ("labels", "base_nll", "reference_nll")


@pytest.fixture
def dataset():
    return Dataset.from_dict({"name": list("abcde"), **{name: GOLDEN[name] for name in COLUMNS}})


@pytest.mark.parametrize("scope", ["dataset", "sequence"])
def test_equals_the_official_selection(dataset, scope):
    cleaned = clean_tokens(dataset, keep=GOLDEN["keep"], scope=scope)
    found = [[i, j] for i, row in enumerate(cleaned["labels"]) for j, label in enumerate(row) if label != -100]
    assert found == GOLDEN[scope]
    for before, after in zip(GOLDEN["labels"], cleaned["labels"], strict=True):
        assert all(new in (old, -100) for old, new in zip(before, after, strict=True))
    assert cleaned["name"] == dataset["name"]
    assert cleaned["base_nll"] == dataset["base_nll"]
    assert dataset["labels"] == GOLDEN["labels"]


def test_rows_picked_and_formatted_beforehand(dataset):
    reversed_rows = dataset.select([4, 3, 2, 1, 0]).with_format("torch")
    cleaned = clean_tokens(reversed_rows, keep=GOLDEN["keep"], scope="sequence")
    expected = clean_tokens(dataset, keep=GOLDEN["keep"], scope="sequence")
    assert [row.tolist() for row in cleaned["labels"]] == expected["labels"][::-1]


def test_everything_stays_but_the_label_that_nothing_predicts():
    dataset = Dataset.from_dict({"labels": [[5, 6, 7]], "base_nll": [[9.0, 1.0, 1.0]], "reference_nll": [[0.0] * 3]})
    assert clean_tokens(dataset, keep=1.0)["labels"] == [[-100, 6, 7]]
    assert clean_tokens(dataset, keep="1 tokens")["labels"] == [[-100, 6, -100]]


def test_refusals(dataset):
    with pytest.raises(InputError, match=r"dataset.base_nll: is missing. There are name, labels, reference_nll"):
        clean_tokens(dataset.remove_columns("base_nll"))
    with pytest.raises(InputError, match=r"keep: 60 is not a share.*\n?scope: 'global' is unknown"):
        clean_tokens(dataset, keep=60, scope="global")
    short = Dataset.from_dict({"labels": [[1, 2]], "base_nll": [[0.0]], "reference_nll": [[0.0, 1.0]]})
    with pytest.raises(InputError, match=r"dataset\[0\]: has 2, 1 and 2 labels, base_nll and reference_nll"):
        clean_tokens(short)


def test_weights_in_training():
    tokens = TokenBatch(
        torch.zeros(4),
        torch.tensor([0, 0, 1, 1]),
        2,
        base_nll=torch.tensor([5.0, 4.0, 3.0, 3.0]),
        reference_nll=torch.tensor([1.0, 1.0, 2.5, 2.0]),
    )
    assert tw.TokenCleaning(keep=0.5).weights(tokens).tolist() == [1, 0, 0, 1]
    assert tw.TokenCleaning(keep=0.5, scope="micro_batch").weights(tokens).tolist() == [1, 1, 0, 0]
    assert tw.TokenCleaning(keep=1).weights(tokens).tolist() == [1, 1, 1, 1]


def test_training_on_columns_equals_training_on_a_cleaned_data_set(tiny_llama):
    longest = max(len(labels) for labels in GOLDEN["labels"])

    def stacked(values, fill):
        return torch.stack([torch.tensor(row + [fill] * (longest - len(row))) for row in values])

    labels = stacked(GOLDEN["labels"], -100)
    batch = {"input_ids": labels.clamp_min(0), "labels": labels}
    columns = {name: stacked(GOLDEN[name], 0.0) for name in COLUMNS[1:]}
    found = tw.weighted_loss(tiny_llama, {**batch, **columns}, tw.TokenCleaning(keep=0.6))
    cleaned = clean_tokens(Dataset.from_dict({name: GOLDEN[name] for name in COLUMNS}), 0.6, "sequence")
    expected = tiny_llama(input_ids=batch["input_ids"], labels=stacked(cleaned["labels"], -100)).loss
    torch.testing.assert_close(found, expected)


def test_a_ranking_over_the_step_is_the_same_however_it_is_divided(tiny_llama, tmp_path):
    generator = torch.Generator().manual_seed(4)
    rows = [
        {**row, **{name: torch.rand(12, generator=generator) for name in COLUMNS[1:]}}
        for row in padded(sequences(), "right")
    ]
    method = tw.TokenCleaning(keep=0.4, scope="step")
    one, losses, handle = train(tiny_llama.double(), rows, method, tmp_path, 8, 1, steps=2)
    four, theirs, _ = train(tiny_llama, rows, method, tmp_path, 2, 4, steps=2)
    assert distance(one, four) < 1e-6
    assert theirs == pytest.approx(losses, abs=1e-6)
    assert handle.stats["kept_share"] == pytest.approx(0.4, abs=0.01)
