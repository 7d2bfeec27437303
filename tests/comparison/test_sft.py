import json

import pytest
import torch
from small_plans import lines, problems, sft_task, sum_rows, write_plan
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenwise.cli.main import main
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.quality import EXACT_MATCH
from tokenwise.comparison.report import write_report
from tokenwise.comparison.rows import Responses
from tokenwise.comparison.sft import HeldOutResponses, _pad_left
from tokenwise.comparison.tasks import TASKS
from tokenwise.models.load import load_tokenizer, make_or_load_model


@pytest.fixture
def folder(tmp_path):
    lines(tmp_path / "train.jsonl", sum_rows(0, 40))
    lines(tmp_path / "eval.jsonl", sum_rows(40, 46))
    return tmp_path


def run(folder, plan):
    """All jobs of a plan, in this process."""
    plan.prepare(folder / "out")
    return [TASKS["sft"].run(job, folder / "out" / job.key, lambda event: None) for job in plan.jobs(folder / "out")]


def test_from_plan_to_answer_and_report(folder):
    plan = read_plan(write_plan(folder, sft_task(), ["uniform", "loss_weights", {"random": {"keep": 0.5}}]))
    results = run(folder, plan)
    uniform, weighted, random = results
    assert [result.status for result in results] == ["finished"] * 3
    assert uniform.costs.tokens_seen == weighted.costs.tokens_seen > random.costs.tokens_trained
    assert uniform.weights["mean_weight"] == 1.0
    assert 1.0 < weighted.weights["mean_weight"] < 2.0
    assert uniform.costs.flops > 0
    assert weighted.example is None  # its weights are in the training data alone
    tokens, weights = uniform.example["tokens"], uniform.example["weights"]
    start = weights.index(1.0)
    assert "".join(tokens[:start]).endswith("Assistant:")
    assert weights[:start] == [None] * start
    assert weights[start:] == [1.0] * (len(tokens) - start)

    # The loss of a response is the plain one of its tokens.
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / uniform.job.key / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / uniform.job.key / "model")
    row = sum_rows(40, 41)[0]
    prompt = tokenizer(f"User: {row['question']}\n\nAssistant:")["input_ids"]
    response = tokenizer(f" {row['answer']}{tokenizer.eos_token}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
    assert uniform.quality.tokens[0] == len(response)
    assert uniform.quality.nll[0] == pytest.approx(expected, rel=1e-4)

    summary = {**plan.summary(), "seeds": [0], "budget": "", "folder": "", "command": ""}
    assert "40 rows; held out: 6 rows" in summary["data"]
    conclusion = conclude(results, summary)
    assert conclusion.measure.name == "response loss"
    write_report(folder / "report.html", conclusion, results, "plan", summary)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("Response loss", "Exact match", "6 rows, ", "response tokens"):
        assert part in page
    assert "held-out loss" not in page.lower()


def test_answers_are_greedy_whatever_stands_beside_them_in_a_batch(folder):
    plan = read_plan(write_plan(folder, sft_task(metric="exact_match"), ["uniform", "dynamic_loss"]))
    plan.prepare(folder / "out")
    task = plan.jobs(folder / "out")[0].task
    rows, tokenizer = Responses.load(task["held_out_rows"]), load_tokenizer(task["tokenizer"])
    model = make_or_load_model(task["model"], 0, tokenizer)
    held_out = HeldOutResponses(rows, tokenizer, task)
    together = held_out.answers(model)
    for index in range(len(rows)):
        ids = held_out._prompt(index)[None]
        for _ in range(8):
            following = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
            if following == tokenizer.eos_token_id:
                break
        assert together[index] == tokenizer.decode(ids[0, rows.prompts[index] :], skip_special_tokens=True)

    # Only what follows the mark counts, and an answer without it is none.
    assert [text.partition("#### ")[2] for text in rows.expected] == ["41", "43", "42", "44", "46", "45"]
    held_out.answers = lambda model: ["so\n#### 40", " ####43 ", "42", "#### 1", "", "#### 45"]
    quality, _ = held_out.measure(model)
    assert quality.metric == "exact_match"
    assert quality.correct == [False, True, False, False, False, True]
    assert quality.details[EXACT_MATCH] == pytest.approx(100 * 2 / 6)


def test_prompts_are_padded_on_the_left():
    ids, mask = _pad_left([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_everything_wrong_with_the_data_is_told_at_once_with_exit_code_2(folder, capsys):
    lines(
        folder / "train.jsonl", [{"question": "a"}, {"question": "a", "answer": " "}, {"prompt": "b", "completion": 1}]
    )
    lines(folder / "eval.jsonl", [{"messages": []}, {"question": "x" * 500, "answer": "y"}])
    write_plan(folder, sft_task(), ["uniform", "dynamic_loss"])
    assert main(["compare", str(folder / "plan.yaml"), "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    for part in ("train.jsonl' line 1: has the fields question", "line 2: has an empty response", "holds int"):
        assert part in error
    assert "eval.jsonl' line 1: does not end with a response" in error


def test_responses_that_are_all_cut_off_are_told(folder):
    lines(folder / "train.jsonl", [{"question": "x " * 100, "answer": "y"}] * 3)
    write_plan(folder, sft_task(), ["uniform", "dynamic_loss"])
    [problem] = problems(folder)
    assert "task.data.train: no row has a response within 64 tokens" in problem


def test_what_does_not_fit_the_task_is_told(folder):
    lines(folder / "train.jsonl", [{"question": "a", "answer": "b"}] * 3)
    write_plan(folder, sft_task(), ["uniform", "loss_weights"])
    [problem] = problems(folder)
    assert "task.data.train: its rows have no weights" in problem
    write_plan(folder, sft_task(max_lenght=3, metric="match"), ["uniform", "./own.py:Objective"])
    found = "\n".join(problems(folder))
    assert "task.max_lenght: there is no field 'max_lenght'. Did you mean 'max_length'?" in found
    assert "task.metric: 'match' is not known here." in found
    assert "gives losses over the classes of examples; sft compares weights of tokens." in found
    assert "Compare it in a task of kind classification." in found
    write_plan(folder, sft_task(kind="stf"), ["uniform", "dynamic_loss"])
    assert "task.kind: 'stf' is not known here. Did you mean 'sft'?" in "\n".join(problems(folder))
    write_plan(folder, sft_task(max_new_tokens=90), ["uniform", "dynamic_loss"])
    assert "task.max_new_tokens: the longest prompt and 90 new tokens are" in "\n".join(problems(folder))


def test_what_decides_a_run_decides_its_key(folder):
    def keys(**changes):
        plan = read_plan(write_plan(folder, sft_task(**changes), ["uniform", "dynamic_loss"]))
        plan.prepare(folder / "out")
        return {job.key for job in plan.jobs(folder / "out")}

    first = keys()
    assert keys() == first
    assert not keys(max_length=60) & first
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2"}), encoding="utf-8")
    assert not keys() & first
