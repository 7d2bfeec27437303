"""tokenwise unlearn, from files to a saved model."""

from __future__ import annotations

import json

import pytest
import torch

from tokenwise.cli.main import main
from tokenwise.models.load import load_model, make_or_load_model, train_tokenizer
from tokenwise.weighting.unlearning_data import UnlearningCollator, read_examples

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that knows eight answers by heart, and files of them."""
    folder = tmp_path_factory.mktemp("unlearn")
    records = [{"question": f"Who is {name}?", "answer": f"{name[::-1]} number {i}"} for i, name in enumerate(NAMES)]
    for name, part in (("forget", records[:2]), ("retain", records[2:6]), ("held", records[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    tokenizer = train_tokenizer([f"Question: {r['question']}\nAnswer: {r['answer']}" for r in records], 330)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 64, **sizes}
    model = make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer)
    rows = [row for name in ("forget", "retain", "held") for row in read_examples(folder / f"{name}.jsonl", tokenizer)]
    batch = UnlearningCollator(tokenizer.pad_token_id)(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def command(folder, out, *more):
    files = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]
    return ["unlearn", str(folder / "model"), *files, "--out", str(out), *more]


@pytest.mark.parametrize("lora", [[], ["--lora", "8"]], ids=["whole", "lora"])
def test_it_forgets_and_keeps_and_saves(folder, tmp_path, capsys, lora):
    out = tmp_path / "new" / "model"
    more = [
        "--method",
        "npo",
        "-p",
        "beta=0.2",
        "--steps",
        "25",
        "--lr",
        "3e-3" if lora else "1e-3",
        "--batch-size",
        "2",
    ]
    assert main(command(folder, out, *more, "--eval-retain", str(folder / "held.jsonl"), *lora)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("npo, 25 steps")
    for words in ("forget (2)", "retain (4)", "held-out retain (2)", "word for word", f"Model: {out}"):
        assert words in shown
    assert "was forgotten" not in shown
    written = json.loads((out / "tokenwise_unlearning.json").read_text(encoding="utf-8"))
    assert written["method"]["npo"]["beta"] == 0.2
    assert written["steps"] == 25
    before, after = written["before"], written["after"]
    assert before["forget"]["exact"] == before["retain"]["exact"] == 1
    assert after["forget"]["exact"] == 0
    assert after["forget"]["nll"] > before["forget"]["nll"] + 1
    assert after["retain"]["nll"] < after["forget"]["nll"] - 1
    assert {path.name for path in out.parent.iterdir()} == {"model"}
    again = load_model(out)
    changed = load_model(folder / "model").state_dict()
    assert again.state_dict().keys() == changed.keys()
    assert not torch.equal(again.model.layers[0].mlp.up_proj.weight, changed["model.layers.0.mlp.up_proj.weight"])
    assert (out / "tokenizer.json").is_file()


def test_too_little_and_too_much_are_said(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "little", "--steps", "1", "--lr", "1e-9")) == 0
    assert "Next to nothing was forgotten" in capsys.readouterr().out
    assert main(command(folder, tmp_path / "much", "--steps", "8", "--lr", "1e-2", "--method", "gradient_ascent")) == 0
    assert "What should stay suffered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "nop"], "there is no unlearning method 'nop'.\n    Did you mean 'npo'?"),
        (["--method", "dft"], "this is no unlearning method: 'dft'"),
        (["--method", "npo", "-p", "beta=0"], "--method.npo.beta"),
        (["--method", "npo", "-p", "betta=1"], "Did you mean 'beta'?"),
        (["--eval-retain", "nowhere.jsonl"], "--eval-retain"),
        (["--max-length", "3"], "has no answer token left"),
    ],
)
def test_bad_input_is_refused_before_work_starts(folder, tmp_path, capsys, more, message):
    assert main(command(folder, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_and_an_empty_file_are_refused(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path)) == 2
    assert "exists already" in capsys.readouterr().err
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    arguments = command(folder, tmp_path / "out")
    arguments[arguments.index("--forget") + 1] = str(empty)
    assert main(arguments) == 2
    assert "holds no example" in capsys.readouterr().err
    arguments[arguments.index("--forget") + 1] = str(tmp_path / "emty.jsonl")
    assert main(arguments) == 2
    assert "empty.jsonl'?" in capsys.readouterr().err
