import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tokenwise import catalog
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.tasks import Unlearning

EXAMPLES = Path(__file__).parents[2] / "examples"


def prepare(name, *arguments):
    command = [sys.executable, "-I", EXAMPLES / name / "prepare.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def copy_plan(name, folder):
    """The example's plan in a folder of its own, with methods that every version knows."""
    plan = yaml.safe_load((EXAMPLES / name / "plan.yaml").read_text(encoding="utf-8"))
    plan["task"]["model"]["config"] |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    plan["training"]["learning_rate"] = 1e-3
    names = {entry["name"] for entry in catalog.entries().values()}
    written = [method if isinstance(method, str) else next(iter(method)) for method in plan["methods"]]
    plan["methods"] = [method for method, name in zip(plan["methods"], written, strict=True) if name in names]
    if len(plan["methods"]) == 1:
        (folder / "own.py").write_text(
            "from tokenwise.weighting.uniform import Uniform\n"
            'class Own(Uniform):\n    """Plain."""\n    kind = "classes"\n',
            encoding="utf-8",
        )
        plan["methods"].append("./own.py:Own")
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return read_plan(folder / "plan.yaml")


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solutions")
    attempts = [
        {
            "question": f"How much is {n} and {n}?",
            "ground_truth": f"It is <<{n}+{n}={2 * n}>>{2 * n}.\nA: {2 * n}",
            "small": {"solution": f"It is {n}.\nA: {n}", "is_correct": False},
            "large": {"solution": f"It is {2 * n}.\nA: {2 * n}", "is_correct": True},
        }
        for n in range(20)
    ]
    right = [{"question": f"What is {n}?", "answer": f"It is that.\n#### {n}"} for n in range(20)]
    for name, lines in (("attempts", attempts), ("right", right)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_right_and_wrong_solutions_are_mixed_and_weighed(solutions, tmp_path):
    done = prepare("mixed_solutions", solutions, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    train, held_out = (rows(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "eval"))
    assert len(held_out) == 8
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert all("\n#### " in row["answer"] for row in [*train, *held_out])
    for row in train:
        if row["question"].startswith("How"):
            n = int(row["question"].split()[3])
            assert row["weight"] == (1.0 if row["answer"].endswith(f"#### {2 * n}") else 0.1) or n == 0
    copy_plan("mixed_solutions", tmp_path).prepare(tmp_path / "out")


def test_one_class_is_a_hundred_times_as_frequent_and_a_fifth_of_its_labels_is_wrong(tmp_path):
    first = prepare("imbalance", tmp_path / "data")
    assert first.returncode == 0, first.stderr
    train, held_out = (rows(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "eval"))
    assert Counter(row["label"] for row in train) == {"normal": 10_000, "fault": 100}
    assert Counter(row["label"] for row in held_out) == {"normal": 200, "fault": 200}
    assert "20 of these wrongly" in first.stdout
    prepare("imbalance", tmp_path / "again")
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "data" / "train.jsonl").read_bytes()
    copy_plan("imbalance", tmp_path).prepare(tmp_path / "out")


@pytest.mark.parametrize("name", ["mixed_solutions", "imbalance"])
def test_wrong_use_says_how(name):
    done = prepare(name)
    assert done.returncode == 1
    assert "Usage" in done.stderr


def test_facts_are_forgotten_by_person():
    script = runpy.run_path(str(EXAMPLES / "unlearning" / "prepare.py"))
    people = script["facts"](script["FORGET"] + script["RETAIN"] + script["EVAL"])
    assert people == script["facts"](len(people))
    questions = [row["question"] for person in people for row in person]
    assert len(set(questions)) == len(questions) == 4 * 56  # nobody is in two files
    plan = yaml.safe_load((EXAMPLES / "unlearning" / "plan.yaml").read_text(encoding="utf-8"))
    for method in plan["methods"]:
        Unlearning.check_method(catalog.build(method), "methods")
