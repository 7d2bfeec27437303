import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tokenwise import catalog
from tokenwise.comparison.data import Windows
from tokenwise.comparison.plan import LEARNING_RATE_EXISTING, LEARNING_RATE_FROM_SCRATCH, read_plan
from tokenwise.errors import InputError
from tokenwise.models import load

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CONFIG = {"model_type": "llama", **SIZES, "max_position_embeddings": 64}
MINE = '''
from typing import ClassVar
from tokenwise.method import Method
from tokenwise.weighting.base import TokenWeighter

class Mine(TokenWeighter):
    """Mine."""
    keep: float = 0.5
    def weights(self, batch, state=None):
        return batch.labels * 0 + 1

class Abstract(TokenWeighter):
    """Not finished."""

class Elsewhere(Method):
    """Of no family this task knows."""

class NeedsReference(Mine):
    """Forgot its field."""
    reads: ClassVar[frozenset[str]] = frozenset({"reference_nll"})
'''


def lines(words):
    return "".join(json.dumps({"text": f"{word} is number {index}"}) + "\n" for index, word in enumerate(words))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with data, a saved model and a method."""
    folder = tmp_path_factory.mktemp("filled")
    words = [f"word{index % 7} and {index}" for index in range(120)]
    (folder / "train.jsonl").write_text(lines(words))
    (folder / "eval.jsonl").write_text(lines(words[::9]))
    (folder / "clean.jsonl").write_text(lines(words[::2]))
    (folder / "mine.py").write_text(MINE)
    tokenizer = load.train_tokenizer(words, 280)
    model = load.make_or_load_model({"config": CONFIG}, 0, tokenizer)
    for name in ("model", "other"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    load.train_tokenizer([word.upper() for word in words], 280).save_pretrained(folder / "other")
    return folder


@pytest.fixture
def folder(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "plan")


def plan_of(**changes):
    """A plan that is right, with some of its sections replaced; None removes a section."""
    sections = {
        "task": {
            "kind": "language_modeling",
            "model": {"config": CONFIG, "tokenizer": {"train": "byte_bpe", "vocab_size": 300}},
            "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
            "sequence_length": 16,
        },
        "budget": {"unit": "tokens_seen", "amount": 2000},
        "methods": ["uniform", {"dynamic_loss": {"temperature": 0.5}}],
        **changes,
    }
    return {name: section for name, section in sections.items() if section is not None}


def task_of(**changes):
    return {**plan_of()["task"], **changes}


def read(folder, text=None, **changes):
    path = folder / "plan.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(plan_of(**changes), sort_keys=False))
    return read_plan(path)


def problems(folder, text=None, **changes):
    with pytest.raises(InputError) as caught:
        read(folder, text, **changes)
    return [str(problem) for problem in caught.value.problems]


def labels(plan):
    return [(entry.label, entry.role) for entry in plan.entries]


# What a plan says


def test_a_plan_has_sensible_defaults(folder):
    plan = read(folder)
    assert plan.seeds == (0, 1, 2)
    assert plan.training.learning_rate == LEARNING_RATE_FROM_SCRATCH
    assert plan.training.schedule == "cosine"
    assert labels(plan) == [("uniform", "baseline"), ("dynamic_loss", "candidate")]
    assert read(folder, task=task_of(model="./model")).training.learning_rate == LEARNING_RATE_EXISTING
    assert read(folder, training={"learning_rate": 0.01}).training.learning_rate == 0.01


def test_numbers_are_read_as_people_write_them(folder):
    text = yaml.safe_dump(plan_of(budget=None, training=None))
    plan = read(folder, text + "training: {learning_rate: 1e-3}\nbudget: {unit: tokens_seen, amount: 2e5}\n")
    assert plan.training.learning_rate == 0.001
    assert plan.budget.plain() == {"unit": "tokens_seen", "amount": 200000}


def test_the_summary_is_for_people(folder):
    summary = read(folder, seeds=[3, 4]).summary()
    learnt = "byte-level BPE of 300 tokens learnt from the training data"
    assert summary == {
        "task": "language modeling, sequences of 16 tokens",
        "model": f"llama made from scratch, 12.2k parameters, {learnt}",
        "data": "trained on train.jsonl, measured on eval.jsonl",
        "budget": "2,000 tokens seen in each run",
        "seeds": "3, 4",
        "baseline": "uniform",
        "plan_file": str(folder / "plan.yaml"),
    }
    assert read(folder, task=task_of(model="./model")).summary()["model"] == "./model"


# Methods, labels, roles


def test_a_missing_baseline_is_added(folder):
    assert labels(read(folder, methods=["dft"])) == [("uniform", "baseline"), ("dft", "candidate")]


def test_the_baseline_can_be_any_method(folder):
    methods = ["uniform", {"label": "half", "method": {"focal": {"gamma": 0.5}}}, "focal"]
    assert dict(labels(read(folder, methods=methods, baseline="half")))["half"] == "baseline"
    assert dict(labels(read(folder, methods=["uniform", "dft"], baseline="weighting/dft")))["dft"] == "baseline"


def test_methods_of_one_name_are_told_apart_by_what_differs(folder):
    methods = ["focal", {"focal": {"gamma": 1}}, {"label": "strong", "method": {"focal": {"gamma": 5.0}}}]
    found = [label for label, _ in labels(read(folder, methods=methods))]
    assert found == ["uniform", "focal gamma=2.0", "focal gamma=1.0", "strong"]


def test_each_selecting_method_gets_a_control_that_keeps_as_much(folder):
    methods = [
        {"top_entropy": {"keep": 0.5}},
        {"excess_loss": {"keep": 0.5, "reference": "./model"}},
        {"top_entropy": {"keep": 0.5, "scope": "sequence"}},
        {"label": "everything", "method": {"top_entropy": {"keep": 1.0}}},
    ]
    plan = read(folder, task=task_of(model="./model"), methods=methods)
    controls = [entry for entry in plan.entries if entry.role == "control"]
    assert [(entry.method.keep, entry.method.scope) for entry in controls] == [(0.5, "micro_batch"), (0.5, "sequence")]
    assert [entry.label for entry in controls] == ["random scope=micro_batch", "random scope=sequence"]
    assert [entry.control for entry in plan.entries] == [
        None,
        "random scope=micro_batch",
        "random scope=micro_batch",
        "random scope=sequence",
        None,
        None,
        None,
    ]


def test_a_listed_control_is_not_added_again(folder):
    plan = read(folder, methods=[{"random": {"keep": 0.3}}, {"random": {"keep": 0.5}}, {"top_entropy": {"keep": 0.3}}])
    assert labels(plan) == [
        ("uniform", "baseline"),
        ("random keep=0.3", "control"),
        ("random keep=0.5", "candidate"),
        ("top_entropy", "candidate"),
    ]
    plan = read(folder, methods=["random", {"top_entropy": {"keep": 0.6}}], baseline="random")
    assert labels(plan) == [("random", "baseline"), ("top_entropy", "candidate")]


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["uniform", "excess_los"], "methods[1]: there is no method 'excess_los'. Did you mean 'excess_loss'?"),
        ([{"random": {"keep": 1.5}}], "methods[0].random.keep: 1.5 is not a share"),
        ([{"focal": {"gama": 1}}], "methods[0].focal.gama: there is no field 'gama'. Did you mean 'gamma'?"),
        (["dft", "dft"], "methods[1]: is the same method as methods[0]."),
        (["dft", {"label": "x", "method": {"dft": None}}], "methods[1].method: is the same method as methods[0]."),
        (["dft", {"label": "dft", "method": "focal"}], "methods[1].method: the label 'dft' is taken by methods[0]."),
        (["uniform"], "methods: there is nothing to compare the baseline with."),
        ([], "methods: lists no method."),
        ("dft", "methods: 'dft' is not a list. Write ['dft'], for example."),
        (["loss_weights"], "methods[0]: 'weighting/loss_weights' needs a column loss_weights"),
        (["ceu"], "methods[0]: 'weighting/ceu' gives a loss of its own"),
        ([{"label": "x"}], "methods[0]: has a label but no method."),
        ([{"label": 3, "method": "dft"}], "methods[0].label: 3 is not text. Write it in quotes."),
        ([{"label": "x", "method": "dft", "keep": 1}], "methods[0].keep: is no part of it."),
        ([7], "methods[0]: 7 is not a method."),
        (["./mine.py:Mime"], "methods[0]: mine.py has no method class 'Mime'. Did you mean 'Mine'?"),
        (["./mine.py:Abstract"], "methods[0]: ./mine.py:Abstract cannot be used: Can't instantiate abstract class"),
        (["./mine.py:Elsewhere"], "methods[0]: 'user/elsewhere' is no weighting method"),
        (["./mine.py:NeedsReference"], "methods[0]: 'weighting/needs_reference' reads a reference model"),
        (["./none.py:Mine"], "none.py' does not exist."),
    ],
)
def test_what_is_wrong_with_the_methods_is_said(folder, methods, expected):
    assert any(expected in problem for problem in problems(folder, methods=methods))


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("dfd", "baseline: 'dfd' is not among the methods. Did you mean 'dft'?"),
        ("focal", "baseline: 'focal' may be any of methods[1], methods[2]."),
        (3, "baseline: 3 is not text. Write it in quotes."),
    ],
)
def test_what_is_wrong_with_the_baseline_is_said(folder, baseline, expected):
    found = problems(folder, methods=["dft", {"focal": {"gamma": 1.0}}, {"focal": {"gamma": 3.0}}], baseline=baseline)
    assert len(found) == 1
    assert found[0].startswith(expected)


# References


def excess(reference):
    return [{"excess_loss": {"reference": reference}}]


def test_references_are_the_plans_own_or_directories(folder):
    plan = read(folder, references={"clean": {"train_on": "clean.jsonl"}}, methods=excess("clean"))
    assert plan.references["clean"].train_on == (folder / "clean.jsonl",)
    task = task_of(model="./model")
    plan = read(folder, task=task, references={"old": {"model": "./model"}}, methods=excess("old"))
    assert plan.references["old"].model == folder / "model"
    assert read(folder, task=task, methods=excess("./model")).references["./model"].model == folder / "model"


@pytest.mark.parametrize(
    ("references", "name", "expected"),
    [
        ({"clean": {"train_on": "clean.jsonl"}}, "claen", "methods[0].excess_loss.reference: there is no reference"),
        ({"clean": {"train_on": "clean.jsonl"}}, "./model", "references.clean: is used by no method. Remove it."),
        ({}, "clean", "there is no reference 'clean'. Define it under references, or write a directory."),
        ({}, "./modle", "modle' does not exist. Did you mean"),
        ({}, "./other", "reference ./other: '{folder}/other' has another vocabulary"),
        ({"clean": {"train_on": "eval.jsonl"}}, "clean", "eval.jsonl' is also in task.data.eval."),
        ({"clean": {"train_on": "none.jsonl"}}, "clean", "references.clean.train_on: '{folder}/none.jsonl' does not"),
        ({"clean": {}}, "clean", "references.clean: needs one of train_on, model and scores."),
        (
            {"clean": {"train_on": "clean.jsonl", "model": "./model"}},
            "clean",
            "needs one of train_on, model and scores.",
        ),
        (
            {"clean": {"model": "./model", "budget": {"unit": "steps", "amount": 1}}},
            "clean",
            "clean.budget: is not used",
        ),
        ({"clean": {"model": 3}}, "clean", "references.clean.model: 3 is not a model."),
        ({"clean": {"model": "./plan.yaml"}}, "clean", "is a file, not a model directory"),
        ({"clean": {"trainon": "x"}}, "clean", "references.clean.trainon: there is no field 'trainon'. Did you mean"),
        ({"clean": "clean.jsonl"}, "clean", "references.clean: 'clean.jsonl' is not a mapping. Its keys: train_on"),
        ([], "./model", "references: [] is not a mapping."),
        (
            {"clean": {"train_on": "clean.jsonl", "budget": {"unit": "tokens_seen", "amount": 1}}},
            "clean",
            "references.clean.budget.amount: 1 tokens seen are less than one step, which takes 120.",
        ),
    ],
)
def test_what_is_wrong_with_a_reference_is_said(folder, references, name, expected):
    found = problems(folder, task=task_of(model="./model"), references=references, methods=excess(name))
    assert any(expected.replace("{folder}", str(folder)) in problem for problem in found), found


def test_a_misspelt_reference_does_not_leave_the_right_one_unused(folder):
    found = problems(folder, references={"clean": {"train_on": "clean.jsonl"}}, methods=excess("claen"))
    assert found == ["methods[0].excess_loss.reference: there is no reference 'claen'. Did you mean 'clean'?"]


# Everything else that can be wrong


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": None}, "task: is missing."),
        ({"budget": None}, "budget: is missing."),
        ({"methods": None}, "methods: is missing."),
        ({"tsk": 1}, "tsk: is no part of a plan. Did you mean 'task'?"),
        ({"task": task_of(kind="language_modelling")}, "task.kind: 'language_modelling' is not known here. Did you"),
        ({"task": task_of(sequence_length=65)}, "task.sequence_length: 65 is more than the 64 positions of the model."),
        ({"task": task_of(sequence_length=1)}, "task.sequence_length: 1 should be greater than or equal to 2."),
        ({"task": task_of(model=3)}, "task.model: 3 is not a model."),
        ({"task": task_of(model="./modle")}, "Did you mean"),
        ({"task": task_of(model={"config": CONFIG})}, "task.model.tokenizer: is missing. It is: A directory"),
        ({"task": task_of(model={"config": CONFIG, "tokenizer": 3})}, "task.model.tokenizer: 3 is not a tokenizer."),
        ({"task": task_of(data="train.jsonl")}, "task.data: 'train.jsonl' is not a mapping. Its keys: train, eval"),
        ({"task": task_of(data={"train": "trian.jsonl", "eval": "eval.jsonl"})}, "train.jsonl'?"),
        ({"task": task_of(data={"train": "*.jsonl", "eval": "eval.jsonl"})}, "Held-out text must not be trained on."),
        ({"task": {"kind": "language_modeling"}}, "task.data: is missing. It is: {train: ..., eval: ...}."),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: -1 should be greater than 0."),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: nan should be a finite number."),
        ({"training": {"warmup": "off"}}, "training.warmup: 'off' is not a number."),
        ({"training": {"batch_size": True}}, "training.batch_size: True is not a number."),
        ({"training": {"batch_size": 1.5}}, "training.batch_size: 1.5 is not a whole number."),
        ({"training": {"schedule": "cosin"}}, "training.schedule: 'cosin' is not known here. Did you mean 'cosine'?"),
        ({"training": {"lerning_rate": 1}}, "there is no field 'lerning_rate'. Did you mean 'learning_rate'?"),
        (
            {"budget": {"unit": "token_seen", "amount": 5000}},
            "budget.unit: 'token_seen' is not known here. Did you mean",
        ),
        ({"budget": {"unit": "steps", "amount": 1.5}}, "budget.amount: 1.5 is not a whole number of steps."),
        ({"budget": {"unit": "steps", "amount": 0}}, "budget.amount: 0 should be greater than 0."),
        ({"budget": {"unit": "flops", "amount": "2M"}}, "budget.amount: '2M' is not a number."),
        ({"budget": {"unit": "tokens_seen", "amount": 119}}, "budget.amount: 119 tokens seen are less than one step"),
        ({"seeds": 3}, "seeds: 3 is not a list. Write [3], for example."),
        ({"seeds": []}, "seeds: is an empty list."),
        ({"seeds": [1, 1]}, "seeds: [1, 1] holds 1 more than once"),
        ({"seeds": [-1]}, "seeds[0]: -1 should be greater than or equal to 0."),
    ],
)
def test_what_is_wrong_with_a_section_is_said(folder, changes, expected):
    found = problems(folder, **changes)
    assert len(found) <= 2
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({**CONFIG, "model_type": "lama"}, "./model", "task.model.config.model_type: there is no model type 'lama'."),
        ({**CONFIG, "hiden_size": 3}, "./model", "task.model.config.hiden_size: a llama config has no field"),
        (
            {**CONFIG, "vocab_size": 200},
            "./model",
            "task.model.config.vocab_size: the tokenizer does not fit the model",
        ),
        ({**CONFIG, "vocab_size": 200}, {"train": "byte_bpe", "vocab_size": 300}, "200 is too small for a tokenizer"),
        (CONFIG, {"train": "byte_bpe", "vocab_size": 100}, "tokenizer.vocab_size: 100 should be greater than or equal"),
        (CONFIG, {"train": "bpe", "vocab_size": 300}, "tokenizer.train: 'bpe' is not known here. Known: byte_bpe."),
        (CONFIG, {"train": "byte_bpe", "size": 1}, "tokenizer.size: there is no field 'size'."),
        (CONFIG, "./modle", "Did you mean"),
    ],
)
def test_what_is_wrong_with_a_new_model_is_said(folder, config, tokenizer, expected):
    found = problems(folder, task=task_of(model={"config": config, "tokenizer": tokenizer}))
    assert any(expected in problem for problem in found), found


def test_all_problems_are_told_at_once(folder):
    found = problems(
        folder,
        task=task_of(
            model={"config": {**CONFIG, "hiden_size": 1}, "tokenizer": {"train": "bpe", "vocab_size": 300}},
            data={"train": ["a.txt", "*.md"], "eval": "b.txt", "field": "x"},
        ),
        training={"warmup": 2},
        budget={"unit": "stepps", "amount": "much"},
        seeds=[0, "one"],
        references={"clean": {}, "unused": {"train_on": "clean.jsonl"}},
        methods=["excess_los", {"excess_loss": {"keep": 2, "reference": "clean"}}],
        baseline="dft",
        extra=1,
    )
    fields = [problem.split(": ")[0] for problem in found]
    assert fields == [
        "extra",
        "task.model.config.hiden_size",
        "task.model.tokenizer.train",
        "task.data.train[0]",
        "task.data.train[1]",
        "task.data.eval",
        "task.data.field",
        "training.warmup",
        "budget.unit",
        "budget.amount",
        "seeds[1]",
        "references.clean",
        "methods[0]",
        "methods[1].excess_loss.keep",
        "references.unused",
        "baseline",
    ]


@pytest.mark.parametrize(("text", "expected"), [("", "is empty."), ("- 1\n", "holds [1], not a mapping.")])
def test_a_plan_is_a_mapping(folder, text, expected):
    assert problems(folder, text) == [
        f"plan.yaml: {expected} A plan has the keys task, training, budget, seeds, references, methods, baseline."
    ]


# Preparing and jobs


def jobs_of(plan, out):
    plan.prepare(out)
    return plan.jobs(out)


def full_plan(folder, **changes):
    settings = {
        "seeds": [5, 6],
        "references": {"clean": {"train_on": "clean.jsonl", "budget": {"unit": "steps", "amount": 3}}},
        "methods": ["uniform", {"excess_loss": {"keep": 0.5, "reference": "clean"}}, "./mine.py:Mine"],
        **changes,
    }
    return read(folder, **settings)


def test_jobs_come_references_first_and_then_by_seed(folder):
    jobs = jobs_of(full_plan(folder), folder / "out")
    order = ["uniform", "excess_loss", "mine", "random"]
    assert [(job.kind, job.label, job.seed) for job in jobs] == [
        ("reference", "clean", 5),
        *[("run", label, seed) for seed in (5, 6) for label in order],
    ]
    reference, uniform, excess_loss, mine, random = jobs[:5]
    assert reference.budget == {"unit": "steps", "amount": 3}
    assert uniform.budget == {"unit": "tokens_seen", "amount": 2000}
    assert reference.task["train"] == [str(folder / "clean.jsonl")]
    assert uniform.task["train"] == [str(folder / "train.jsonl")]
    assert (excess_loss.reference, uniform.reference) == ("clean", None)
    assert excess_loss.inputs["reference"] == reference.key
    assert random.role == "control"
    assert (excess_loss.control, uniform.control, random.control) == ("random", None, None)
    assert mine.method == {"mine.py:Mine": {"keep": 0.5}}
    assert mine.task["method_folder"] == str(folder)
    assert uniform.task["training"]["learning_rate"] == LEARNING_RATE_FROM_SCRATCH
    assert uniform.task["model"] == {"config": CONFIG}
    assert len({job.key for job in jobs}) == len(jobs)


def test_a_user_method_can_be_built_from_its_job(folder):
    job = next(job for job in jobs_of(full_plan(folder), folder / "out") if job.label == "mine")
    assert catalog.build(job.method, folder=Path(job.task["method_folder"])).keep == 0.5


def test_what_a_job_reads_is_prepared(folder):
    jobs = jobs_of(full_plan(folder), folder / "out")
    tokenizer = load.load_tokenizer(jobs[0].task["tokenizer"])
    assert len(tokenizer) == 300
    model = load.make_or_load_model(jobs[1].task["model"], 5, tokenizer)
    assert model.config.vocab_size == 300
    clean, train = (np.load(job.task["train_blocks"], mmap_mode="r") for job in jobs[:2])
    assert train.shape[1] == 16
    assert len(clean) < len(train)
    assert "word0 and 0 is number 0" in tokenizer.decode(train[:4].ravel())
    windows = Windows.load(jobs[1].task["held_out_windows"])
    assert len(windows.text_bytes) == 14
    assert tokenizer.decode(windows.labels[0][windows.labels[0] >= 0]).startswith("word0 and 0 is")


def test_a_plan_is_prepared_once(folder):
    stages = []
    plan = full_plan(folder)
    plan.prepare(folder / "out", stages.append)
    assert stages == ["training the tokenizer", "reading train.jsonl", "reading clean.jsonl", "reading eval.jsonl"]
    full_plan(folder).prepare(folder / "out", stages.append)
    assert len(stages) == 4
    (folder / "clean.jsonl").write_text(lines("abcdefghijklmnopqrstuvwxyz"))
    full_plan(folder).prepare(folder / "out", stages.append)
    assert stages[4:] == ["reading clean.jsonl"]


def test_keys_follow_content_and_not_places(folder, tmp_path):
    first = jobs_of(full_plan(folder), folder / "out")
    moved = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("out"))
    assert [job.key for job in jobs_of(full_plan(moved), moved / "results")] == [job.key for job in first]

    (moved / "mine.py").write_text(MINE + "# changed\n")
    changed = {
        job.label
        for job, old in zip(jobs_of(full_plan(moved), moved / "out"), first, strict=True)
        if job.key != old.key
    }
    assert changed == {"mine"}
    (moved / "clean.jsonl").write_text(lines("abcdefghijklmnopqrstuvwxyz"))
    changed = {
        job.label
        for job, old in zip(jobs_of(full_plan(moved), moved / "out"), first, strict=True)
        if job.key != old.key
    }
    assert changed == {"mine", "clean", "excess_loss"}
    (moved / "eval.jsonl").write_text(lines("abc"))
    assert not {job.key for job in jobs_of(full_plan(moved), moved / "out")} & {job.key for job in first}


def test_labels_and_further_seeds_leave_keys_alone(folder):
    first = jobs_of(read(folder, methods=["dft", "focal"], seeds=[0]), folder / "out")
    methods = [{"label": "mine", "method": "dft"}, "focal", {"focal": {"gamma": 0.5}}]
    second = jobs_of(read(folder, methods=methods, seeds=[0, 1]), folder / "out")
    assert {job.key for job in first} < {job.key for job in second}
    third = jobs_of(read(folder, methods=["dft", "focal"], seeds=[0], training={"warmup": 0}), folder / "out")
    assert not {job.key for job in first} & {job.key for job in third}


def test_an_existing_model_and_reference_are_known_by_their_weights(folder):
    def run():
        changes = {"references": {"old": {"model": "./model"}}, "methods": excess("old"), "seeds": [0]}
        return {
            job.label: job for job in jobs_of(read(folder, task=task_of(model="./model"), **changes), folder / "out")
        }

    before = run()
    assert list(before) == ["uniform", "excess_loss", "random"]
    assert before["excess_loss"].reference is None
    assert before["excess_loss"].task["reference"] == str(folder / "model")
    assert before["uniform"].task["model"] == before["uniform"].task["tokenizer"] == str(folder / "model")
    tokenizer = load.load_tokenizer(folder / "model")
    load.make_or_load_model({"config": CONFIG}, 1, tokenizer).save_pretrained(folder / "model")
    after = run()
    assert all(before[label].key != after[label].key for label in before)


def test_what_is_wrong_with_the_data_is_told_at_once_before_any_run(folder):
    (folder / "train.jsonl").write_text(lines(["a"]))
    (folder / "clean.jsonl").write_text('{"body": "a"}\n')
    (folder / "eval.jsonl").write_text('{"text": ""}\n')
    plan = full_plan(folder, task=task_of(model="./model"))
    with pytest.raises(InputError) as caught:
        plan.prepare(folder / "out")
    said = [str(problem) for problem in caught.value.problems]
    assert said[0].startswith("task.data.train: too short: ")
    assert "128 are needed" in said[0]
    assert said[1].startswith("references.clean.train_on: ")
    assert "has no field 'text'; it has body." in said[1]
    assert said[2].startswith("task.data.eval: there is no text in")
    assert len(said) == 3


def test_a_larger_batch_asks_prepared_data_again(folder):
    (folder / "train.jsonl").write_text(lines("abcdefghijkl"))
    read(folder, training={"batch_size": 2}).prepare(folder / "out")
    plan = read(folder, training={"batch_size": 64})
    with pytest.raises(InputError, match=r"1,024 are needed \(a batch of 64"):
        plan.prepare(folder / "out")


def test_an_existing_reference_must_share_a_newly_trained_vocabulary(folder):
    plan = read(folder, methods=excess("./model"))
    with pytest.raises(InputError, match=r"reference \./model: .* has another vocabulary"):
        plan.prepare(folder / "out")
