"""Self-evolving cleaning: against the rounds done by hand, on data with corrupted tokens, and across a kill."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.self_evolving import self_evolving_cleaning

NOISE = 32
"""From this token id on tokens are noise: drawn at random, while the others count up."""


def rows(count=60, length=12):
    """Sequences that count up from a random start, a quarter of whose tokens are replaced by noise, with a prompt of
    two tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        start = int(torch.randint(1, 20, (1,), generator=generator))
        ids = torch.arange(start, start + length)
        noisy = torch.rand(length, generator=generator) < 0.25
        ids = torch.where(noisy, torch.randint(NOISE, 64, (length,), generator=generator), ids)
        found.append({"input_ids": ids.tolist(), "labels": [-100, -100, *ids[2:].tolist()]})
    return Dataset.from_list(found)


def trainer(seen=None, steps=30, stop_at=None):
    """A `train` that takes full-batch steps, and notes the labels of each round."""

    def train(model, part, number):
        if number == stop_at:
            raise KeyboardInterrupt
        if seen is not None:
            seen[number] = (part["input_ids"], part["labels"])
            assert set(part.column_names) == {"input_ids", "labels"}
        torch.manual_seed(number)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids, labels = torch.tensor(part["input_ids"]), torch.tensor(part["labels"])
        model.train()
        for _ in range(steps):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    return train


@pytest.fixture
def model(tiny_llama):
    return tiny_llama.eval()


def test_corrupted_tokens_are_kept_less_often(model):
    seen = {}
    found = self_evolving_cleaning(model, rows(), trainer(seen), rounds=2, warm_up=0.4, keep=0.6)
    assert [each.number for each in found.rounds] == [0, 1, 2]
    assert [each.rows for each in found.rounds] == [24, 18, 18]
    assert found.rounds[0].kept_share == 1
    assert found.rounds[0].mean_score is None
    for number in (1, 2):
        kept = {True: [], False: []}
        for ids, labels in zip(*seen[number], strict=True):
            for token, label in list(zip(ids, labels, strict=True))[2:]:
                kept[token >= NOISE].append(label != -100)
        clean, noise = (sum(kept[is_noise]) / len(kept[is_noise]) for is_noise in (False, True))
        assert clean > noise + 0.3, (number, clean, noise)
        figures = found.rounds[number]
        assert figures.labels == 18 * 10
        assert figures.kept == sum(kept[True]) + sum(kept[False])
        assert figures.kept_share == pytest.approx(0.6, abs=0.01)
        assert figures.mean_kept_score > figures.mean_score


@pytest.mark.parametrize("scope", ["dataset", "sequence"])
def test_equals_the_rounds_done_by_hand(model, scope):
    data = rows(20)
    base = copy.deepcopy(model)
    seen, expected = {}, {}
    evolved = self_evolving_cleaning(model, data, trainer(seen, 3), rounds=2, warm_up=0.25, keep=0.5, scope=scope)

    def nll(which, part):
        with torch.no_grad():
            logits = which(input_ids=torch.tensor(part["input_ids"])).logits[:, :-1]
        targets = torch.tensor(part["input_ids"])[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return torch.nn.functional.pad(losses, (1, 0))

    by_hand = trainer(expected, 3)(copy.deepcopy(base), data.select(range(5)), 0)
    for number, (start, stop) in enumerate([(5, 12), (12, 20)], 1):
        part = data.select(range(start, stop))
        columns = {"base_nll": nll(base, part), "reference_nll": nll(by_hand, part)}
        scored = part
        for name, values in columns.items():
            # Stored losses have the digits of half precision.
            scored = scored.add_column(name, values.half().float().tolist())
        cleaned = tw.weighting.clean_tokens(scored, 0.5, scope)
        by_hand = trainer(expected, 3)(by_hand, cleaned.select_columns(["input_ids", "labels"]), number)
    assert seen == expected
    for name, value in evolved.model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=0, atol=0)


def test_a_killed_run_goes_on_with_the_round_it_was_at(model, tmp_path):
    data = rows(20)
    options = {"rounds": 3, "warm_up": 0.25}
    whole = self_evolving_cleaning(copy.deepcopy(model), data, trainer(steps=3), **options)
    stopped = trainer(steps=3, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        self_evolving_cleaning(copy.deepcopy(model), data, stopped, folder=tmp_path / "run", **options)
    seen = {}
    again = self_evolving_cleaning(copy.deepcopy(model), data, trainer(seen, 3), folder=tmp_path / "run", **options)
    assert sorted(seen) == [2, 3]
    assert again.rounds == whole.rounds
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=0, atol=0)
    # A finished run answers without training.
    finished = self_evolving_cleaning(copy.deepcopy(model), data, None, folder=tmp_path / "run", **options)
    assert finished.rounds == whole.rounds
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    with pytest.raises(InputError, match=r"of a run with another 'keep'"):
        self_evolving_cleaning(copy.deepcopy(model), data, None, folder=tmp_path / "run", keep=0.5, **options)
    with pytest.raises(InputError, match=r"of a run with another 'model'"):
        self_evolving_cleaning(finished.model, data, None, folder=tmp_path / "run", **options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds other files"):
        self_evolving_cleaning(model, data, None, folder=tmp_path / "other", **options)


def test_refusals(model):
    data = rows(10)
    with pytest.raises(InputError, match=r"keep: 60(.|\n)*scope: 'global'(.|\n)*rounds: 0(.|\n)*warm_up: 1"):
        self_evolving_cleaning(model, data, trainer(), keep=60, scope="global", rounds=0, warm_up=1)
    with pytest.raises(InputError, match=r"dataset.labels: is missing"):
        self_evolving_cleaning(model, data.remove_columns("labels"), trainer())
    with pytest.raises(InputError, match="10 rows, which leaves none for part 1 of 21"):
        self_evolving_cleaning(model, data, trainer(), rounds=20)
    with pytest.raises(InputError, match="train: gave NoneType"):
        self_evolving_cleaning(model, data, lambda *_: None)
    with pytest.raises(InputError, match="model: Linear is no transformers model"):
        self_evolving_cleaning(torch.nn.Linear(1, 1), data, trainer())
