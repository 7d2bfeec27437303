import json
from dataclasses import dataclass

import pytest

from tokenwise.comparison.export import export_winner
from tokenwise.comparison.quality import TextLoss
from tokenwise.comparison.records import Job, Result
from tokenwise.errors import InputError


@dataclass
class Winner:
    winner: str | None


def result_of(folder, label, seed, loss, kind="run"):
    task = {"model": {"config": {}}, "train": ["/somewhere/a.jsonl"], "sequence_length": 8}
    job = Job(kind, label, seed, {label: {"keep": 0.5}}, "candidate", task, {"unit": "steps", "amount": 1})
    result = Result(job, "failed", "it died")
    if loss is not None:
        path = f"runs/{job.key}/model"
        result = Result(job, "finished", quality=TextLoss([loss], [1], [1]), model_dir=path, versions={"torch": "2"})
        (folder / path).mkdir(parents=True)
        (folder / path / "model.safetensors").write_text(f"{label} {seed}")
    return result


@pytest.fixture
def results(tmp_path):
    return [
        result_of(tmp_path, "random", 9, 0.1, kind="reference"),
        result_of(tmp_path, "uniform", 1, 2.0),
        result_of(tmp_path, "random", 1, 1.5),
        result_of(tmp_path, "random", 2, 1.0),
        result_of(tmp_path, "random", 3, None),
        result_of(tmp_path, "focal", 1, None),
    ]


def test_the_best_seed_of_the_winner_is_written_with_its_method(results, tmp_path):
    out = tmp_path / "new" / "best"
    assert export_winner(tmp_path, results, Winner("random"), out) == out
    assert (out / "model.safetensors").read_text() == "random 2"
    record = json.loads((out / "tokenwise.json").read_text())
    assert record["method"] == {"random": {"keep": 0.5}}
    assert (record["seed"], record["key"]) == (2, results[3].job.key)
    assert record["held_out"]["held-out loss (nats/token)"] == 1.0
    assert record["versions"] == {"torch": "2"}
    assert "/somewhere" not in json.dumps(record)
    assert [path.name for path in out.parent.iterdir()] == ["best"]


def test_any_method_can_be_named_and_an_empty_folder_is_used(results, tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    export_winner(tmp_path, results, Winner(None), out, "uniform")
    assert (out / "model.safetensors").read_text() == "uniform 1"


@pytest.mark.parametrize(
    ("winner", "method", "message"),
    [
        (None, None, "no winner to export.*--method: uniform, random, focal"),
        ("random", "unifrm", "Did you mean 'uniform'"),
        ("random", "focal", "no run of 'focal' has finished"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_way_out(results, tmp_path, winner, method, message):
    with pytest.raises(InputError, match=message):
        export_winner(tmp_path, results, Winner(winner), tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(results, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not an empty folder"):
        export_winner(tmp_path, results, Winner("random"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_model_that_is_gone_is_named(results, tmp_path):
    (tmp_path / results[3].model_dir / "model.safetensors").unlink()
    (tmp_path / results[3].model_dir).rmdir()
    with pytest.raises(InputError, match=r"model of 'random' \(seed 2\).*any more"):
        export_winner(tmp_path, results, Winner("random"), tmp_path / "out")
