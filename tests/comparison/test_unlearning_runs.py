import json

import numpy as np
import pytest
import torch
from small_plans import lines, problems, write_plan

from tokenwise.comparison import unlearning
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.report import write_report
from tokenwise.comparison.rows import Answers
from tokenwise.comparison.tasks import TASKS
from tokenwise.models.load import load_tokenizer, make_or_load_model, train_tokenizer
from tokenwise.weighting.unlearning_data import UnlearningCollator, example
from tokenwise.weighting.unlearning_run import recall

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")
RECORDS = [{"question": f"Who is {name}?", "answer": f"{name[::-1]} number {i}"} for i, name in enumerate(NAMES)]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A tiny model that knows eight answers by heart."""
    folder = tmp_path_factory.mktemp("known") / "model"
    tokenizer = train_tokenizer([f"Question: {r['question']}\nAnswer: {r['answer']}" for r in RECORDS], 330)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 64, **sizes}
    model = make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer)
    batch = UnlearningCollator(tokenizer.pad_token_id)([example(record, tokenizer) for record in RECORDS])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    for name, part in (("forget", RECORDS[:2]), ("retain", RECORDS[2:6]), ("kept", RECORDS[6:])):
        lines(tmp_path / f"{name}.jsonl", part)
    return tmp_path


def task(model, **data):
    data = {"forget": "forget.jsonl", "retain": "retain.jsonl", **data}
    return {"kind": "unlearning", "model": model, "data": data, "max_length": 32}


def run(folder, plan):
    """All jobs of a plan, in this process."""
    plan.prepare(folder / "out")
    run_job = TASKS["unlearning"].run
    return [run_job(job, folder / "out" / job.key, lambda event: None) for job in plan.jobs(folder / "out")]


def test_from_plan_to_answer_and_report(folder, known):
    sections = {
        "budget": {"unit": "steps", "amount": 25},
        "training": {"batch_size": 2, "learning_rate": 3e-3, "evaluations": 2},
    }
    methods = ["npo", {"gradient_ascent": {}}]
    plan = read_plan(write_plan(folder, task(known), methods, **sections))
    results = run(folder, plan)
    assert [(result.job.label, result.status) for result in results] == [
        ("uniform", "finished"),
        ("npo", "finished"),
        ("gradient_ascent", "finished"),
    ]
    uniform, npo, ascent = results
    details = {result.job.label: {m.name: v for m, v in result.quality.details.items()} for result in results}
    assert details["uniform"]["forget probability"] > 50  # nothing pushed it away
    assert details["uniform"]["retain probability"] > 95
    assert details["npo"]["forget probability"] < 30
    assert details["npo"]["retain probability"] > 70
    assert npo.quality.value < uniform.quality.value - 20
    assert npo.curve[-1].held_out == pytest.approx(npo.quality.value)
    assert npo.costs.tokens_trained is None
    # A step has two rows to keep, and as many to forget where the method reads them.
    assert npo.costs.tokens_seen == uniform.costs.tokens_seen + ascent.costs.tokens_seen
    assert npo.costs.flops > uniform.costs.flops

    # What is measured is what `tokenwise unlearn` measures.
    tokenizer = load_tokenizer(known)
    model = make_or_load_model(str(folder / "out" / npo.job.key / "model"), 0, tokenizer)
    rows = [example(record, tokenizer) for record in RECORDS]
    for name, part in (("forget", rows[:2]), ("retain", rows[2:6])):
        found = recall(model, part, tokenizer.pad_token_id)
        assert details["npo"][f"{name} probability"] == pytest.approx(100 * found.probability, rel=1e-3)

    summary = {**plan.summary(), "seeds": [0], "budget": "", "folder": "", "command": ""}
    assert summary["task"] == "unlearning, rows of at most 32 tokens"
    assert "2 rows to forget, 4 to keep; measured on those to forget and those to keep" in summary["data"]
    conclusion = conclude(results, summary)
    assert conclusion.held_out == "2 answers to forget and 4 to keep"
    assert "The smaller of the two sets has 2 held-out answers" in " ".join(conclusion.notes)
    write_report(folder / "report.html", conclusion, results, "plan", summary)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("Unlearning error", "percentage points", "Forget probability", "Retain loss", "nats/token"):
        assert part in page


def test_what_is_kept_can_be_measured_on_other_answers(folder, known):
    plan = read_plan(write_plan(folder, task(known, eval="kept.jsonl"), ["npo"]))
    plan.prepare(folder / "out")
    job = plan.jobs(folder / "out")[0]
    train, held_out = (Answers.load(job.task[name]) for name in ("train_rows", "held_out_rows"))
    assert (train.forget.tolist(), held_out.forget.tolist()) == ([True] * 2 + [False] * 4, [True] * 2 + [False] * 2)
    tokenizer = load_tokenizer(known)
    row = example(RECORDS[7], tokenizer)
    assert held_out.input_ids[held_out.span(3)].tolist() == row["input_ids"]
    assert held_out.labels[held_out.span(3)].tolist() == row["labels"]
    assert "2 others to keep" in plan.summary()["data"]


def test_a_file_that_changes_sides_is_another_run(folder, known):
    for name, part in (("a", RECORDS[:2]), ("b", RECORDS[2:4]), ("c", RECORDS[4:])):
        lines(folder / f"{name}.jsonl", part)
    keys = set()
    for forget, retain in ((["a.jsonl"], ["b.jsonl", "c.jsonl"]), (["a.jsonl", "b.jsonl"], ["c.jsonl"])):
        plan = read_plan(write_plan(folder, task(known, forget=forget, retain=retain, eval="c.jsonl"), ["npo"]))
        plan.prepare(folder / "out")
        job = plan.jobs(folder / "out")[0]
        keys |= {job.key, job.task["train_rows"]}
    assert len(keys) == 4


def test_every_row_comes_once_before_it_comes_again_and_what_is_kept_in_one_order_for_all(folder, known):
    plan = read_plan(write_plan(folder, task(known), ["npo", "gradient_ascent"]))
    plan.prepare(folder / "out")
    rows = Answers.load(plan.jobs(folder / "out")[0].task["train_rows"])
    drawn = {}
    for entry in plan.entries:
        data = unlearning._endless(rows, entry.method, 3)
        read = [row for index in range(12) for row in data[index]]
        for forget in (True, False):
            found = [tuple(row["input_ids"].tolist()) for row in read if bool(row["forget"].all()) == forget]
            drawn[entry.label, forget] = found
            size = 2 if forget else 4
            assert all(len(set(found[start : start + size])) == size for start in range(0, len(found), size))
    counts = {key: len(found) for key, found in drawn.items()}
    assert counts == {
        ("uniform", True): 0,
        ("uniform", False): 12,
        ("npo", True): 12,
        ("npo", False): 12,
        ("gradient_ascent", True): 12,
        ("gradient_ascent", False): 0,
    }
    assert drawn["npo", False] == drawn["uniform", False]
    assert drawn["npo", True] == drawn["gradient_ascent", True]


def test_the_first_answers_of_both_kinds_are_measured_on_the_way(folder, known, monkeypatch):
    monkeypatch.setattr(unlearning, "CURVE_ANSWERS", 1)
    plan = read_plan(write_plan(folder, task(known), ["npo"]))
    plan.prepare(folder / "out")
    rows = Answers.load(plan.jobs(folder / "out")[0].task["held_out_rows"])
    tokenizer = load_tokenizer(known)
    held_out = unlearning.HeldOutAnswers(rows, tokenizer.pad_token_id, "fp32")
    model = make_or_load_model(known, 0, tokenizer)
    quality, point = held_out.measure(model)
    assert held_out.on_the_way(model) == pytest.approx(point, abs=1e-3)
    probability = np.exp(-np.divide(quality.nll, quality.tokens))
    forgotten, kept = 1 - probability[0], probability[2]
    assert point == pytest.approx(100 * (1 - 2 * forgotten * kept / (forgotten + kept)))


@pytest.mark.parametrize(
    ("changes", "methods", "expected"),
    [
        ({}, ["focal"], "'weighting/focal' gives weights of tokens; unlearning compares a loss of its own that reads"),
        ({}, ["asft"], "'weighting/asft' gives a loss of its own; unlearning compares a loss of its own that reads"),
        ({"retain": "forget.jsonl"}, ["npo"], "task.data.forget: "),
        ({"eval": "forget.jsonl"}, ["npo"], "forget.jsonl' is also in task.data.eval."),
        ({"retain": "none.jsonl"}, ["npo"], "task.data.retain: "),
    ],
)
def test_what_is_wrong_with_a_plan(folder, known, changes, methods, expected):
    write_plan(folder, task(known, **changes), methods)
    assert expected in "\n".join(problems(folder))


def test_a_model_from_scratch_and_references_of_its_own_are_refused(folder, known):
    model = {"config": {"model_type": "llama"}, "tokenizer": {"train": "byte_bpe", "vocab_size": 280}}
    write_plan(folder, task(model), ["npo"])
    assert "task.model: a model made from scratch knows nothing that it could forget." in problems(folder)[0]
    references = {"before": {"train_on": "kept.jsonl"}}
    write_plan(folder, task(known), [{"npo": {"reference": "before"}}], references=references)
    assert "references.before.train_on: unlearning trains no references." in "\n".join(problems(folder))
    write_plan(folder, task(known), [{"npo": {"reference": "before"}}], references={"before": {"model": known}})
    assert problems(folder) == []


def test_everything_wrong_with_the_rows_is_told_at_once(folder, known):
    with (folder / "forget.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "Who?"}) + "\n" + json.dumps({"question": 1, "answer": "a"}) + "\n")
    lines(folder / "retain.jsonl", [{"question": "long " * 40, "answer": "a"}])
    write_plan(folder, task(known), ["npo"])
    found = "\n".join(problems(folder))
    for part in ("line 3: has question.", "line 4: question is int, not text."):
        assert part in found
    assert "task.data.retain: no row has an answer within 32 tokens." in found
