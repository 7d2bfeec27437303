"""FAIT's weights and rows."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.fault_aware import FaultAware, FaultAwareStatic, fault_pair

CORRECT = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return x - 2\n"


@pytest.fixture(scope="module")
def tokenizer():
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator([CORRECT, WRONG], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<end>", pad_token="<end>")


def tokens(nll, difference, sample):
    size = len(nll)
    return TokenBatch(
        torch.zeros(size, dtype=torch.int64),
        torch.tensor(sample),
        max(sample) + 1,
        nll=torch.tensor(nll),
        difference=torch.tensor(difference),
        sample_id=torch.tensor(sample),
    )


def test_worked_weights():
    # Sample 4: flagged correct tokens 3 and 1, wrong 1.5: d = 2 - 1.5. Sample 9: no difference.
    batch = tokens([5.0, 3, 1, 1, 2, 0.3], [0.0, 1, 1, -1, -1, 0], [4, 4, 4, 4, 4, 9])
    flagged = 1 + 2 / (1 + math.exp(-0.5 / 0.25))
    found = FaultAware(strength=2, temperature=0.25).weights(batch)
    torch.testing.assert_close(found, torch.tensor([1, flagged, flagged, 0, 0, 1]))
    assert FaultAware(strength=0).weights(batch).tolist() == [1, 1, 1, 0, 0, 1]
    assert FaultAwareStatic(strength=0.5).weights(batch).tolist() == [1, 1.5, 1.5, 0, 0, 1]
    worse = FaultAware().weights(tokens([9.0, 1.0], [1.0, -1], [0, 0]))
    better = FaultAware().weights(tokens([1.0, 9.0], [1.0, -1], [0, 0]))
    assert worse[0] > 1.99
    assert better[0] < 1.01
    with pytest.raises(InputError, match="sample 3 has its correct program in the batch"):
        FaultAware().weights(tokens([1.0, 1.0], [1.0, -1], [3, 2]))


def test_rows_of_a_pair(tokenizer):
    good, bad = fault_pair(tokenizer, "write f: ", CORRECT, WRONG, sample_id=7)
    prompt = tokenizer("write f: ")["input_ids"]
    assert good["input_ids"] == [*prompt, *tokenizer(CORRECT)["input_ids"], tokenizer.eos_token_id]
    assert good["labels"] == [-100] * len(prompt) + good["input_ids"][len(prompt) :]
    assert "".join(text_of(tokenizer, good, 1)).split() == ["+", "1"]
    assert "".join(text_of(tokenizer, bad, -1)).split() == ["-", "2"]
    assert [label != -100 for label in bad["labels"]] == [value == -1 for value in bad["difference"]]
    assert set(good["sample_id"] + bad["sample_id"]) == {7}
    for row in (good, bad):
        assert len({len(values) for values in row.values()}) == 1
    same, other = fault_pair(tokenizer, "", CORRECT, CORRECT)
    assert not any(same["difference"] + other["difference"])
    assert set(other["labels"]) == {-100}
    _, lacking = fault_pair(tokenizer, "", CORRECT, "def f(x):\n")
    assert lacking["difference"].index(-1) == len(lacking["difference"]) - 1
    _, going_on = fault_pair(tokenizer, "", "a\nb\nc\n", "a\nc\n")
    assert going_on["difference"].count(-1) == 1


def text_of(tokenizer, row, flag):
    ids = [token for token, value in zip(row["input_ids"], row["difference"], strict=True) if value == flag]
    return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))


def test_a_pair_trains_its_correct_program_alone(tokenizer, tiny_llama):
    rows = fault_pair(tokenizer, "f: ", CORRECT, WRONG)
    tiny_llama.resize_token_embeddings(len(tokenizer))
    size = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "difference": 0, "sample_id": 0}
    batch = {
        name: torch.tensor([row[name] + [fill] * (size - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (size - len(row["input_ids"])) for row in rows]
    )
    plain = tiny_llama(
        input_ids=batch["input_ids"][:1], labels=batch["labels"][:1], attention_mask=batch["attention_mask"][:1]
    ).loss
    loss = tw.weighted_loss(tiny_llama, batch, FaultAware(strength=0))
    torch.testing.assert_close(loss, plain, atol=1e-4, rtol=0)
    assert (tw.weighted_loss(tiny_llama, batch, FaultAware(strength=3)) - plain).abs() > 1e-3
