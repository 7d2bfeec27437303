"""`tokenwise score` from files to a store: texts, chats, tokenised rows, and what it says when it cannot."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import tokenwise as tw
from tokenwise.cli.main import main
from tokenwise.models.load import train_tokenizer

TEXTS = [f"the sum of {a} and {b} is {a + b}" for a in range(4) for b in range(4)]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


@pytest.fixture
def model_directory(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(model_directory, tokenizer, tmp_path, capsys):
    records = [{"text": text} for text in TEXTS]
    Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(records))
    write_lines(tmp_path / "rows.jsonl", [*records[:3], {"text": ""}, *records[3:]])
    expected = None
    for name in ("saved", "rows.parquet", "rows.json", "rows.jsonl"):
        out = tmp_path / f"scores-{name}"
        command = ["score", str(model_directory), str(tmp_path / name), "--out", str(out), "--statistics", "logp,rank"]
        assert main(command) == 0
        store = tw.scores.open(out)
        assert store.rows == len(TEXTS)
        found = [store.lookup(tokenizer(text)["input_ids"])["logp"].tolist() for text in TEXTS]
        expected = expected or found
        assert found == expected
        said = capsys.readouterr().out
        assert f"16 rows, {store.manifest.tokens:,} tokens: logp, rank, nll" in said
        assert ("1 more without a token, left out" in said) == (name == "rows.jsonl")
        assert f"Scores: {out}" in said
    model = LlamaForCausalLM.from_pretrained(model_directory)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    logp = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(expected[0][1:]).double(), logp.detach(), rtol=2**-10, atol=1e-5)


def test_text_files_are_a_row_each_and_long_ones_are_cut(model_directory, tokenizer, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(" ".join(TEXTS))
    (tmp_path / "short.txt").write_text(TEXTS[1])
    files = [str(tmp_path / name) for name in ("long.txt", "short.txt")]
    out = tmp_path / "scores"
    assert main(["score", str(model_directory), *files, "--out", str(out), "--batch-tokens", "40"]) == 0
    assert "1 of them cut to 32 tokens" in capsys.readouterr().out
    store = tw.scores.open(out)
    assert tokenizer(" ".join(TEXTS))["input_ids"][:32] in store
    assert tokenizer(TEXTS[1])["input_ids"] in store


def test_chats_go_through_the_template_and_tokenised_rows_as_they_are(model_directory, tokenizer, tmp_path):
    chats = [[{"role": "user", "content": text}, {"role": "bot", "content": "yes"}] for text in ("1 + 1", "the sum")]
    tokenised = [tokenizer(text)["input_ids"] for text in TEXTS[:3]]
    chat_file = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    ids_file = write_lines(tmp_path / "ids.jsonl", [{"input_ids": ids} for ids in tokenised])
    command = ["score", str(model_directory), chat_file, "--field", "messages", "--out", str(tmp_path / "chats")]
    assert main(command) == 2  # the tokenizer has no template
    tokenizer.chat_template = TEMPLATE
    try:
        tokenizer.save_pretrained(model_directory)
        assert main(command) == 0
        store = tw.scores.open(tmp_path / "chats")
        for chat in chats:
            assert tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) in store
    finally:
        tokenizer.chat_template = None
    out = str(tmp_path / "ids")
    assert main(["score", str(model_directory), ids_file, "--field", "input_ids", "--out", out]) == 0
    assert all(ids in tw.scores.open(out) for ids in tokenised)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--statistics", "logp,rnk"], "there is no statistic 'rnk'.\n    Did you mean 'rank'?"),
        (["--top-k", "4"], "--top-k\n    only says how many tokens the statistic top_k keeps."),
        (["--field", "txt"], "has no field 'txt'; it has text.\n    Did you mean 'text'?"),
        (["--max-length", "33"], "33 is more than the model reads (32)."),
        (["--ray", "1.2.3:nowhere"], "there is no Ray cluster at '1.2.3:nowhere'"),
    ],
)
def test_bad_options_are_named(model_directory, tmp_path, capsys, options, expected):
    if "--ray" in options:
        pytest.importorskip("ray")
    data = write_lines(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    assert main(["score", str(model_directory), data, "--out", str(tmp_path / "scores"), *options]) == 2
    assert expected in capsys.readouterr().err


def test_missing_files_and_broken_records_are_named(model_directory, tmp_path, capsys):
    command = ["score", str(model_directory), "--out", str(tmp_path / "scores")]
    write_lines(tmp_path / "rows.jsonl", [{"text": "a b"}, {"text": 3}])
    assert main([*command, str(tmp_path / "row.jsonl")]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "rows.jsonl")]) == 2
    assert "line 2 holds int, where other records hold text." in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert main([*command[:-1], str(tmp_path / "other"), str(tmp_path / "bad.jsonl")]) == 2
    assert "line 2 is not JSON" in capsys.readouterr().err
