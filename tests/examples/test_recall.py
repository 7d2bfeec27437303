"""The recall example: contexts say what the questions ask, and the script runs from contexts to a model."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = Path(__file__).parents[2] / "examples" / "recall" / "train.py"


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("recall_train", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_each_name_stands_once_before_what_belongs_to_it(train):
    generator = np.random.default_rng(0)
    for length in (36, 60, 160):
        words, told, places = train.draw(generator, 12, length)
        assert len(words) == length
        assert places == sorted(places)
        for place, each in zip(places, told, strict=True):
            assert words[place : place + 3] == list(each)
            assert all(words.count(word) == 1 for word in each)
        assert sum(word in train.FILLER for word in words) == length - 36


def test_heads_begin_by_looking_for_what_equals_the_query(train):
    model = train.make_model(train.make_tokenizer())
    attention = model.model.layers[0].self_attn
    queries, keys = attention.q_proj.weight.unflatten(0, (2, 2, -1)), attention.k_proj.weight.unflatten(0, (2, -1))
    noise = (queries - keys.unsqueeze(1)).detach()
    np.testing.assert_allclose(noise.std(), train.NOISE, rtol=0.1)
    # Those that share a key differ, or they would stay alike.
    assert (noise[:, 0] - noise[:, 1]).abs().mean() > train.NOISE
    # All heads together copy.
    values = attention.v_proj.weight.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    copied = (attention.o_proj.weight @ values).detach().numpy()
    np.testing.assert_allclose(copied, np.eye(64), atol=1e-5)


def test_each_seed_has_weights_and_contexts_of_its_own(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EVAL", 2)
    monkeypatch.setattr(train, "MOST_STEPS", 1)
    monkeypatch.setattr(train, "BATCH", 2)
    weights, rows = [], []
    for name, given in (("a", []), ("b", ["--seed", "0"]), ("c", ["--seed", "1"])):
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / name), *given])
        train.main()
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
        rows.append((tmp_path / name / "recall.jsonl").read_text().splitlines())
    assert weights[0] == weights[1] != weights[2]
    assert rows[0] == rows[1]
    assert not set(rows[0]) & set(rows[2])


def test_weights_that_do_not_learn_are_drawn_anew(train, monkeypatch, capsys):
    for name, value in (("MOST_STEPS", 2), ("BATCH", 2), ("PATIENCE", 1)):
        monkeypatch.setattr(train, name, value)
    make, made = train.make_model, []

    def make_model(tokenizer):
        monkeypatch.setattr(train, "LEARNT", 9.0 if made else 0.0)  # the second one learns at once
        made.append(make(tokenizer))
        return made[-1]

    monkeypatch.setattr(train, "make_model", make_model)
    assert train.train(train.make_tokenizer(), 0) is made[1]
    assert len(made) == 2
    assert "not learned in 1 steps" in capsys.readouterr().out
    weights = [model.model.layers[1].mlp.up_proj.weight for model in made]
    assert (weights[0] - weights[1]).abs().mean() > 0.05


def test_from_contexts_to_a_model(train, tmp_path, monkeypatch, capsys):
    for name, value in (("MOST_STEPS", 3), ("BATCH", 2), ("EVAL", 6), ("LEARNT", 9.0)):
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path)])
    train.main()
    assert "of 6 questions" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        words, name = row["context"].split(), row["question"].split()[1]
        place = words.index(name)
        assert row["answer"].split() == words[place + 1 : place + 3]
        assert row["depth"] == round(place / 157, 3)
    texts = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(texts) == 3
    for row in texts:
        assert row["target"].count("ask") == 12
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokenizer(rows[0]["context"], return_tensors="pt")["input_ids"]
    assert ids.shape == (1, 160)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.unk_token_id not in ids
