import ast
import re

import pytest
from rich.console import Console

from tokenwise.cli.evict import _print
from tokenwise.cli.main import main
from tokenwise.comparison.cache_trial import CacheTrial
from tokenwise.models.load import make_or_load_model, train_tokenizer

TEXT = "def add(first, second):\n    return first + second\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with its tokenizer."""
    folder = tmp_path_factory.mktemp("evict")
    tokenizer = train_tokenizer([TEXT] * 3, vocab_size=280)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": None, **sizes}
    model = make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompt.txt").write_text(TEXT, encoding="utf-8")
    return folder


def test_an_answer_before_and_after(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evict", "model", "--method", "k_norm", "--keep", "6 tokens", "-p", "sink=1", "--max-new-tokens", "5"]
    assert main([*arguments, "@prompt.txt", "return second, first + add(second)"]) == 0
    out = capsys.readouterr().out
    assert "k_norm (keep 6 tokens, sink 1" in out
    assert "no chat template" in out
    tables = re.findall(r"cached tokens +(\d+) +([\d.]+) \((\d+)%\)", out)
    # The last token of an answer is never read; what it is given afterwards stays.
    seen = [int(before) for before, _, _ in tables]
    assert [float(after) for _, after, _ in tables] == [10, 10]
    assert all(int(percent) == round(1000 / before) for before, (_, _, percent) in zip(seen, tables, strict=True))
    rows = [line.split(maxsplit=1) for line in out.splitlines() if re.match(r" +\d\.\d\d  '", line)]
    assert "".join(ast.literal_eval(token) for _, token in rows[: seen[0] - 4]) == TEXT
    assert rows[0][0] == "1.00"
    shares = [float(share) for share, _ in rows[: seen[0] - 4]]
    assert sum(shares) == pytest.approx(6, abs=0.1)


def test_budget_is_another_word_for_keep(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evict", "model", "first second", "--method", "random", "--max-new-tokens", "1"]
    found = []
    for option in ("--keep", "--budget"):
        assert main([*arguments, option, "0.5"]) == 0
        found.append(re.sub(r"time .*", "", capsys.readouterr().out))
    assert found[0] == found[1]
    assert "random (keep 0.5" in found[0]


def test_all_kept_changes_nothing(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["evict", "model", "--method", "snap_kv", "--keep", "1", TEXT]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cached tokens +(\d+) +\1 \(100%\)", out)
    # The room behind what is stored is a sixteenth of it at most.
    assert re.search(r"cache +\d+ KiB +\d+ KiB \(10[0-6]%\)", out)


@pytest.mark.parametrize(
    ("arguments", "field", "expected"),
    [
        (["@prompd.txt", "--method", "k_norm"], "PROMPT", "prompt.txt'?"),
        (["", "--method", "k_norm"], "PROMPT", "is empty"),
        ([TEXT * 3, "--method", "k_norm"], "PROMPT", "the model reads 64"),
        ([TEXT, "--method", "k_norn"], "--method", "Did you mean 'k_norm'?"),
        ([TEXT, "--method", "tome"], "--method", "is no method of the cache"),
        ([TEXT, "--method", "k_norm", "--keep", "2"], "--method.k_norm.keep", "whole number is ambiguous"),
        ([TEXT, "--method", "k_norm", "-p", "sinks=2"], "--method.k_norm.sinks", "Did you mean 'sink'?"),
        ([TEXT, "--method", "k_norm", "--keep", "2 tokens", "-p", "sink=4"], "KNorm.keep", "that stay whatever"),
        ([TEXT, "--method", "k_norm", "--max-new-tokens", "0"], "--max-new-tokens", "less than 1"),
    ],
)
def test_what_cannot_be_used_is_said(folder, monkeypatch, capsys, arguments, field, expected):
    monkeypatch.chdir(folder)
    assert main(["evict", "model", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"\n  {field}\n" in error
    assert expected in " ".join(error.split())


def test_what_is_read_is_shown_where_all_is_stored(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evict", "model", TEXT, "--method", "token_select", "--keep", "6 tokens", "-p", "sink=1"]
    assert main([*arguments, "-p", "recent=2", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"tokens read, last step +\d+ +6 \(", out)
    assert "share of layers and heads that read it in the last step" in out


def test_a_missing_model_is_said(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["evict", "./modle", TEXT, "--method", "k_norm"]) == 2
    assert "\n  MODEL\n" in capsys.readouterr().err


def test_a_prompt_goes_through_the_chat_template(folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path)
    assert main(["evict", str(tmp_path), "add", "--method", "k_norm", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "by the chat template" in out
    rows = [line.split(maxsplit=1)[1] for line in out.splitlines() if re.match(r" +\d\.\d\d  '", line)]
    assert "".join(ast.literal_eval(token) for token in rows) == "[add]"


def test_on_a_terminal_the_prompt_is_shaded_by_what_keeps_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    trial = CacheTrial(("a", "b"), 4, 2.5, 4096, 2560, (1.0, 0.5), ["<s>", "x\n", "[b]"], [1.0, 0.0, 0.5])
    console = Console(width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        _print(trial, console)
    out = capture.get()
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert "<s>x↵\n[b]" in plain
    assert "2.5 (62%)" in plain
    assert "0.50×" in plain
    strong, weak = (re.search(rf"\x1b\[([\d;]*)m{re.escape(token)}", out)[1] for token in ("<s>", "[b]"))
    assert "255;138;40" in strong
    assert strong != weak
    assert re.search(r"\x1b\[2mx↵", out)
