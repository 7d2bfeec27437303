import json

import pytest

import tokenwise as tw
from tokenwise.cli.main import main

PLAN = """
task:
  kind: language_modeling
  model:
    config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
    tokenizer: {train: byte_bpe, vocab_size: 280}
  data: {train: train.txt, eval: eval.jsonl}
  sequence_length: 32
training: {batch_size: 4, learning_rate: 1e-2}
budget: {unit: steps, amount: 8}
seeds: [0]
methods: [uniform, {random: {keep: 0.5}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plan with its data, and the results once a test has run it."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "plan.yaml").write_text(PLAN, encoding="utf-8")
    (folder / "train.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)), encoding="utf-8")
    held_out = [json.dumps({"text": f"{n} squared is {n * n}. " * 3}) for n in range(400, 430)]
    (folder / "eval.jsonl").write_text("\n".join(held_out), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_from_plan_to_table_answer_report_and_export(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["compare", "plan.yaml"]) == 0
    first = capsys.readouterr().out
    assert "[2/2]" in first  # the progress
    report = folder / "results" / "plan" / "report.html"
    assert "Report: results/plan/report.html" in first
    assert report.stat().st_size > 10_000
    assert "tokenwise compare plan.yaml --out results/plan --export DIR" in first

    # Everything is there: the second time trains nothing, gives the same answer, and writes out what is asked for.
    results = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("result.json")}
    assert len(results) == 2
    assert main(["compare", "plan.yaml", "--export", "best", "--method", "random"]) == 0
    second = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert "Exported: best" in second
    answer = [line for line in first.splitlines() if "random" in line and "nats/token" in line][-1]
    assert answer in second

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained("best").config.hidden_size == 16
    assert AutoTokenizer.from_pretrained("best")("1 squared")["input_ids"]
    origin = json.loads((folder / "best" / "tokenwise.json").read_text(encoding="utf-8"))
    assert origin["method"]["random"]["keep"] == 0.5


def test_in_python_it_is_one_call(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    comparison = tw.compare("plan.yaml")
    assert comparison.report.is_file()
    assert [row.label for row in comparison.conclusion.rows] == ["uniform", "random"]
    assert all(result.status == "finished" for result in comparison.results)
    with pytest.raises(tw.InputError, match="unifrom"):
        comparison.export("elsewhere", "unifrom")


def test_every_problem_of_a_plan_is_told_before_anything_runs(folder, tmp_path, capsys):
    bad = PLAN.replace("train.txt", "trian.txt").replace("keep: 0.5", "keep: 5").replace("unit: steps", "unit: stepz")
    (tmp_path / "plan.yaml").write_text(bad, encoding="utf-8")
    assert main(["compare", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for part in ("task.data.train", "trian.txt", "methods[1].random.keep", "budget.unit", "stepz"):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_a_missing_plan_is_named(tmp_path, capsys):
    (tmp_path / "plan.yaml").touch()
    assert main(["compare", str(tmp_path / "plam.yaml")]) == 2
    assert "plan.yaml" in capsys.readouterr().err


def test_a_method_to_export_needs_a_folder(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "plan.yaml"), "--method", "random"]) == 2
    assert "Add --export DIR" in capsys.readouterr().err


def test_an_export_that_cannot_work_is_refused_before_anything_runs(folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    start = ["compare", str(folder / "plan.yaml"), "--out", str(tmp_path / "out")]
    assert main([*start, "--export", str(tmp_path / "full")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main([*start, "--export", str(tmp_path / "new"), "--method", "unifrom"]) == 2
    assert "Did you mean 'uniform'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
