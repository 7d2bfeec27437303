"""Comparisons whose methods read token scores instead of a reference model."""

import json
import os

import pytest
import torch
from made_results import summary
from small_plans import SIZES, lines, sft_task, sum_rows, write_plan

import tokenwise as tw
from tokenwise.cli.main import main
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.report import write_report
from tokenwise.comparison.run_folder import RunFolder
from tokenwise.comparison.worker import run_job
from tokenwise.errors import InputError
from tokenwise.models.load import make_or_load_model, train_tokenizer
from tokenwise.scores.layout import Manifest

TEXTS = [f"the sum of {n} and {n % 7} is {n + n % 7}, as everybody can see." for n in range(60)]
CONFIG = {"model_type": "llama", **SIZES, "max_position_embeddings": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of three tasks, the model to train, and another one to score with."""
    folder = tmp_path_factory.mktemp("stored")
    lines(folder / "train.jsonl", [{"text": text} for text in TEXTS[:50]])
    lines(folder / "eval.jsonl", [{"text": text} for text in TEXTS[50:]])
    lines(folder / "sums.jsonl", sum_rows(0, 16))
    lines(folder / "more-sums.jsonl", sum_rows(16, 20))
    answers = [{"question": f"Who is {n}?", "answer": f"number {n} " * (1 + n % 3)} for n in range(12)]
    for name, part in (("forget", answers[:4]), ("retain", answers[4:])):
        lines(folder / f"{name}.jsonl", part)
    tokenizer = train_tokenizer(TEXTS, 280)
    for name, seed in (("model", 0), ("reference", 1)):
        make_or_load_model({"config": CONFIG}, seed, tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


LANGUAGE = {
    "kind": "language_modeling",
    "model": "./model",
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "sequence_length": 24,
}
SFT = {**sft_task(model="./model"), "data": {"train": "sums.jsonl", "eval": "more-sums.jsonl"}}
UNLEARNING = {
    "kind": "unlearning",
    "model": "./model",
    "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
    "max_length": 64,
}


def plan_of(folder, task, method, reference, **sections):
    methods = [{method: {"reference": reference}}]
    return write_plan(folder, task, methods, training={"batch_size": 2, "learning_rate": 1e-2}, **sections)


def problems(path, out):
    with pytest.raises(InputError) as error:
        read_plan(path).prepare(out)
    return str(error.value)


def compared(path, out):
    """The results of a plan, every job run in this process, and the conclusion."""
    plan = read_plan(path)
    plan.prepare(out)
    found = []
    for job in plan.jobs(out):
        run = RunFolder(job, out / "runs" / job.key)
        if not run.finished():
            run.begin()
            with open(os.devnull, "wb") as nowhere:
                run_job(run.job_file, nowhere.fileno())
            run.complete(concurrent=False)
        found.append(run.result())
    return found, conclude(found, {"baseline": plan.baseline, "seeds": plan.seeds})


@pytest.mark.parametrize(("task", "method"), [(LANGUAGE, "excess_loss"), (SFT, "excess_loss"), (UNLEARNING, "npo")])
def test_scores_train_as_their_model_does_and_are_charged(folder, tmp_path, task, method, capsys):
    by_model, _ = compared(plan_of(folder, task, method, "./reference"), tmp_path / "model")
    scores = folder / f"scores-{task['kind']}"
    path = plan_of(folder, task, method, f"./{scores.name}")
    with pytest.raises(InputError, match=r"there is no reference|does not exist"):
        read_plan(path)
    assert main(["score", str(folder / "reference"), str(path), "--out", str(scores)]) == 0
    assert Manifest.read(scores, "").data["names"] == [str(path)]
    by_scores, conclusion = compared(path, tmp_path / "scores")

    computed, stored = (next(r for r in found if r.job.label == method) for found in (by_model, by_scores))
    assert stored.status == "finished", stored.reason
    assert stored.quality.value == pytest.approx(computed.quality.value, rel=2e-3)
    assert stored.costs.flops < computed.costs.flops  # no second model ran beside
    cost = Manifest.read(scores, "").cost
    assert computed.reference_costs is None
    assert stored.reference_costs.flops == cost.flops > 0
    assert stored.reference_costs.wall_seconds == cost.seconds
    row = next(row for row in conclusion.rows if row.label == method)
    baseline = next(row for row in conclusion.rows if row.role == "baseline")
    assert row.relative_flops == pytest.approx((stored.costs.flops + cost.flops) / baseline.costs.flops)
    if task is LANGUAGE:
        _unknown_costs(scores, path, tmp_path, stored)


def _unknown_costs(scores, path, tmp_path, stored):
    """Scores of before costs were kept: the finished runs are used again, and say that they do not know."""
    written = json.loads((scores / "manifest.json").read_text())
    del written["cost"]
    (scores / "manifest.json").write_text(json.dumps(written))
    again, conclusion = compared(path, tmp_path / "scores")
    result = next(result for result in again if result.job.label == stored.job.label)
    assert result.costs == stored.costs
    assert result.reference_costs.flops is None
    row = next(row for row in conclusion.rows if row.label == stored.job.label)
    assert row.relative_flops is None
    write_report(tmp_path / "report.html", conclusion, again, "", summary(1))
    page = (tmp_path / "report.html").read_text()
    assert "FLOPs of the reference of excess_loss" in page
    assert "+ not measured" in page


def test_a_name_for_scores_and_what_does_not_fit(folder, tmp_path):
    rows = [list(range(5, 29)), list(range(40, 64))]
    tw.scores.score(str(folder / "reference"), rows, tmp_path / "others")
    others = str(tmp_path / "others")
    path = plan_of(folder, LANGUAGE, "excess_loss", "mine", references={"mine": {"scores": others}})
    found = problems(path, tmp_path / "out")
    assert "reference mine: " in found
    assert "rows of task.data.train are not in" in found
    assert "(first row 0, 24 tokens: " in found
    assert f"tokenwise score MODEL {path} --out DIR" in found
    # The same when the method names the folder itself, from the plan's folder.
    (folder / "beside").symlink_to(others)
    assert "reference ./beside: " in problems(plan_of(folder, LANGUAGE, "excess_loss", "./beside"), tmp_path / "out")
    both = {"mine": {"scores": others, "model": "./reference"}}
    found = problems(plan_of(folder, LANGUAGE, "excess_loss", "mine", references=both), tmp_path / "out")
    assert "references.mine: needs one of train_on, model and scores." in found
    found = problems(
        plan_of(folder, LANGUAGE, "excess_loss", "mine", references={"mine": {"model": others}}), tmp_path / "out"
    )
    assert "holds token scores, not a model. Write scores: " in found

    tw.scores.score(str(folder / "reference"), rows, tmp_path / "ranks", statistics=("rank",))
    found = problems(plan_of(folder, LANGUAGE, "excess_loss", str(tmp_path / "ranks")), tmp_path / "out")
    assert "methods[0].excess_loss.reference: the scores in " in found
    assert "have no 'logp', only rank. Score the data with --statistics logp." in found

    torch.manual_seed(0)
    other = train_tokenizer([text.upper() for text in TEXTS], 280)
    make_or_load_model({"config": CONFIG}, 0, other).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    tw.scores.score(str(tmp_path / "other"), rows, tmp_path / "foreign")
    found = problems(plan_of(folder, LANGUAGE, "excess_loss", str(tmp_path / "foreign")), tmp_path / "out")
    assert "were made with another tokenizer (vocabulary " in found

    manifest = json.loads((tmp_path / "others" / "manifest.json").read_text())
    for change, expected in (({"vocabulary": 300}, "with 300 logits"), ({"complete": False}, "are not finished")):
        (tmp_path / "others" / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert expected in problems(plan_of(folder, LANGUAGE, "excess_loss", others), tmp_path / "out")


def test_scores_of_labels_do_not_serve_a_method_that_compares_distributions(folder, tmp_path):
    tw.scores.score(str(folder / "reference"), [[1, 2, 3]], tmp_path / "scores")
    for method in ({"npo": {"retain": "kl"}}, {"undial": {}}):
        [(name, fields)] = method.items()
        spec = {name: {**fields, "reference": str(tmp_path / "scores")}}
        found = problems(write_plan(folder, UNLEARNING, [spec]), tmp_path / "out")
        assert f"methods[0].{name}.reference: the " in found
        assert "compares the distributions over all tokens" in found
        assert "Score with --statistics logp,top_k, or name a model." in found
    tw.scores.score(str(folder / "reference"), [[1, 2, 3]], tmp_path / "top", statistics=("logp", "top_k"))
    spec = {"npo": {"retain": "kl", "reference": str(tmp_path / "top")}}
    found = problems(write_plan(folder, UNLEARNING, [spec]), tmp_path / "out")
    assert "compares the distributions" not in found  # what is wrong are its rows alone


def test_scoring_a_plan_takes_no_other_options(folder, tmp_path, capsys):
    path = plan_of(folder, LANGUAGE, "excess_loss", "./none")
    command = ["score", str(folder / "reference"), str(path), "--out", str(tmp_path / "s"), "--max-length", "9"]
    assert main([*command, "--field", "x"]) == 2
    said = capsys.readouterr().err
    assert "--field\n    does not go with a plan" in said
    assert "--max-length\n" in said
    assert not (tmp_path / "s").exists()
