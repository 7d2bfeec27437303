import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import tokenwise as tw
from small_images import image
from small_questions import TEMPLATE, WORDS, question_plan, question_rows, speaker
from tokenwise.comparison import visual_question_answering
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.clock import Clock
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.questions import Questions, read_questions
from tokenwise.comparison.records import Result
from tokenwise.comparison.report import write_report
from tokenwise.comparison.tasks import TASKS
from tokenwise.errors import InputError
from tokenwise.models.flops import FlopMeter
from tokenwise.models.questions import QuestionInputs

PATCHES, LAYERS, CACHED = 16, 3, 2 * 2 * 8 * 4
"""Of an image; of the language model; bytes of one token's key and value in one layer: two heads of eight in fp32."""


def problems(call):
    with pytest.raises(InputError) as found:
        call()
    return [str(problem) for problem in found.value.problems]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A plan, run whole in this process; one run for jobs that are the same."""
    folder = tmp_path_factory.mktemp("questions")
    plan = read_plan(question_plan(folder))
    plan.prepare(folder / "out")
    done = {}
    results = []
    for job in plan.jobs(folder / "out"):
        if job.key not in done:
            done[job.key] = TASKS["visual_question_answering"].run(job, folder / "out", lambda event: None)
        results.append(type(done[job.key])(**{**vars(done[job.key]), "job": job}))
    summary = {**plan.summary(), "seeds": [0, 1], "budget": str(plan.budget), "folder": "out", "command": "again"}
    return folder, plan, results, conclude(results, summary), summary


def of(results, label):
    return next(result for result in results if result.job.label == label)


def asked(folder, index):
    """A model, and its inputs for a question of the plan."""
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    inputs = QuestionInputs(folder / "vlm")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "vlm").eval()
    return model, inputs, inputs(image(index // 2), rows[index]["question"]), rows[index]


def test_methods_of_both_sites_run_beside_controls_that_drop_at_the_same_place(compared):
    _, plan, _, conclusion, summary = compared
    shown = [(entry.label, entry.role, entry.control) for entry in plan.entries]
    assert shown == [
        ("dense", "baseline", None),
        ("faster_vlm", "candidate", "random"),
        ("fast_v", "candidate", "random_decoder"),
        ("random", "control", None),
        ("random_decoder", "control", None),
    ]
    assert plan.entries[-1].method.layer == 1
    assert "8 questions" in summary["data"]
    assert "no chat template" in summary["data"]
    assert conclusion.item == "question"
    assert conclusion.points[0].startswith("Keep 0.5: ")


@pytest.mark.parametrize("label", ["dense", "faster_vlm"])
def test_quality_and_costs_are_those_of_the_reduced_model(compared, label):
    folder, _, results, _, _ = compared
    result = of(results, label)
    quality, costs = result.quality, result.costs
    kept = PATCHES if label == "dense" else PATCHES // 2
    lengths, flops = [], []
    for index in range(8):
        model, inputs, batch, row = asked(folder, index)
        length = batch["input_ids"].shape[1]
        answer = torch.tensor([[WORDS.index(word) for word in row["answer"].split()]])
        # Which patches stay does not follow from the text here: question and answer may be read together.
        ids = torch.cat([batch["input_ids"], answer], 1)
        labels = torch.cat([torch.full((1, length), -100), answer], 1)
        context = nullcontext() if label == "dense" else tw.reduce(model, tw.FasterVLM(keep=0.5))
        with torch.no_grad(), context:
            written = model.generate(**batch, max_new_tokens=3, do_sample=False)
            whole = model(input_ids=ids, pixel_values=batch["pixel_values"], labels=labels)
            with FlopMeter() as meter:
                model(**batch, use_cache=True, logits_to_keep=1)
        assert quality.correct[index] == (inputs.text(written[0, length:]) == row["answer"])
        assert quality.nll[index] / quality.tokens[index] == pytest.approx(float(whole.loss), rel=1e-4)
        lengths.append(length - PATCHES + kept)
        flops.append(meter.flops)
    assert quality.tokens == [2, 1, 1, 2, 1, 1, 2, 1]
    assert costs.flops == sum(flops) / 8
    assert costs.cache_bytes == sum(lengths) / 8 * LAYERS * CACHED
    assert (costs.tokens_before, costs.tokens_after, costs.token_share) == (PATCHES, kept, kept / PATCHES)
    assert costs.wall_seconds > 0 < costs.dense_seconds


def test_tokens_that_leave_inside_the_language_model_leave_its_cache(compared):
    _, _, results, _, _ = compared
    costs = of(results, "fast_v").costs
    assert costs.token_share == pytest.approx(0.5)
    assert costs.tokens_after == PATCHES // 4  # all of them in one layer of three
    dense = of(results, "dense").costs
    assert dense.cache_bytes - costs.cache_bytes == PATCHES * (1 - costs.token_share) * LAYERS * CACHED
    assert costs.flops < dense.flops


def test_what_looking_for_tokens_takes_stands_beside_the_time(compared):
    _, _, results, _, _ = compared
    assert of(results, "dense").costs.scoring_seconds is None
    for label in ("faster_vlm", "fast_v", "random", "random_decoder"):
        assert of(results, label).costs.scoring_seconds > 0


@pytest.mark.parametrize(
    ("method", "looks"),
    [
        (tw.FasterVLM(keep=0.5), {"record", "counts_of", "select"}),
        (tw.DivPrune(keep=0.5), {"counts_of", "select"}),
        (tw.FastV(keep=0.5, layer=1), {"start", "see_attention", "choose"}),
    ],
    ids=lambda part: type(part).__name__,
)
def test_everything_that_a_method_looks_at_is_timed(compared, monkeypatch, method, looks):
    folder, _, _, _, _ = compared
    model, inputs, _, _ = asked(folder, 0)
    timed = Clock.timed
    seen = set()

    def noted(self, function):
        def call(*args):
            seen.add(function.__name__)
            return function(*args)

        return timed(self, call)

    monkeypatch.setattr(Clock, "timed", noted)

    class One:
        questions = ("which colour is it:",)

        def picture(self, index):
            return image(index)

        def __len__(self):
            return 1

    subject = visual_question_answering._Asked(model, inputs, One(), method, 1)
    with torch.no_grad():
        assert visual_question_answering._scoring(subject) > 0
    assert seen == looks


def test_what_is_kept_does_not_follow_from_the_answer(compared):
    folder, _, results, _, _ = compared
    quality = of(results, "fast_v").quality
    model, _, batch, row = asked(folder, 1)
    with torch.no_grad(), tw.reduce(model, tw.FastV(keep=0.5, layer=1)):
        logits = model(**batch).logits[:, -1].float()
    expected = F.cross_entropy(logits, torch.tensor([WORDS.index(row["answer"])]))
    assert quality.nll[1] == pytest.approx(float(expected), rel=1e-4)


def test_the_report_draws_what_was_kept_beside_question_and_answer(compared, tmp_path):
    _, _, results, conclusion, summary = compared
    for label, kept in (("dense", 16), ("faster_vlm", 8), ("fast_v", 4), ("random", 8)):
        pictures = of(results, label).example["pictures"]
        assert len(pictures) == visual_question_answering.EXAMPLES
        assert all(sum(place >= 0 for place in picture["group"]) == kept for picture in pictures)
        assert pictures[0]["grid"] == [4, 4]
    write_report(tmp_path / "report.html", conclusion, results, "plan", summary)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5 * visual_question_answering.EXAMPLES
    assert "which colour is it:" in page
    assert "Key-value cache" in page
    assert page.count(" scoring</") == 4
    assert "in blocks" not in page


def test_a_share_of_the_operations_is_a_budget_at_both_sites(tmp_path):
    plan = read_plan(question_plan(tmp_path, budget={"unit": "flops", "amounts": [0.8]}))
    assert [entry.method.keep for entry in plan.entries[1:]] == ["0.8 flops"] * 4


def test_results_are_read_as_they_were_written(compared, tmp_path):
    _, _, results, _, _ = compared
    results[0].write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == results[0]


def test_another_image_is_another_job(tmp_path):
    file = question_plan(tmp_path)
    keys = []
    for number in (0, 9):
        image(number).save(tmp_path / "images" / "0.png")
        plan = read_plan(file)
        plan.prepare(tmp_path / "out")
        keys.append(plan.jobs(tmp_path / "out")[0].key)
    assert keys[0] != keys[1]


def test_questions_are_read_once_with_their_images(tmp_path):
    file = question_rows(tmp_path, 8)
    found = read_questions([file], None, "task.data.eval")
    assert len(found) == found.total == 8
    assert len(found.ends) == 4
    with (tmp_path / "questions.npz").open("wb") as stream:
        found.save(stream)
    again = Questions.load(tmp_path / "questions.npz")
    assert (again.questions, again.answers) == (found.questions, found.answers)
    assert again.picture(5).tobytes() == image(2).tobytes()
    few = read_questions([file], 3, "task.data.eval")
    assert (len(few), few.total) == (3, 8)
    assert few.questions == read_questions([file], 3, "task.data.eval").questions


def test_bad_questions_are_named_with_their_rows(tmp_path):
    file = question_rows(tmp_path, 2)
    (tmp_path / "images" / "text.png").write_text("no image", encoding="utf-8")
    rows = [
        {"image": "images/0.png", "question": "which"},
        {"image": "images/0.png", "question": "which", "answer": 3},
        {"image": "images/none.png", "question": "which", "answer": "red"},
        {"image": "images/text.png", "question": "which", "answer": "red"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = problems(lambda: read_questions([file], None, "task.data.eval"))
    assert len(found) == 4
    for expected in ("no field 'answer'", "'answer' holds 3, not text", "there is no image", "cannot be decoded"):
        assert any(expected in problem for problem in found), expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ["tome"]}, "works at the site 'encoder'"),
        ({"methods": [{"fast_v": {"layer": 2}}]}, "in which all stay, 2 of 3"),
        ({"task": {"model": "./nowhere"}}, "task.model"),
        ({"task": {"batch_size": 3}}, "task.batch_size"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_runs(tmp_path, changes, expected):
    found = problems(lambda: read_plan(question_plan(tmp_path, **changes)))
    assert any(expected in problem for problem in found), found


def test_a_model_without_its_processor_is_refused(tmp_path):
    file = question_plan(tmp_path)
    (tmp_path / "vlm" / "processor_config.json").unlink()
    found = problems(lambda: read_plan(file))
    assert any(problem.startswith("task.model") and "processor" in problem for problem in found), found


def test_the_chat_template_writes_the_question(tmp_path):
    inputs = QuestionInputs(speaker(tmp_path / "vlm", TEMPLATE))
    assert inputs.prompt("which colour") == "user: <image> which colour"
    assert "chat template" in inputs.described
    assert inputs.answer_ids("which colour", "light red") == [WORDS.index("light"), WORDS.index("red")]


def test_the_example_is_a_plan_to_start_from(tmp_path):
    written = Path(__file__).parents[2] / "examples" / "marked_cell" / "plan.yaml"
    plan = yaml.safe_load(written.read_text(encoding="utf-8"))
    plan["task"]["model"] = str(speaker(tmp_path / "vlm"))
    plan["task"]["data"]["eval"] = str(question_rows(tmp_path, 4))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    labels = [entry.label for entry in read_plan(tmp_path / "plan.yaml").entries]
    assert labels[:2] == ["dense", "faster_vlm 0.75"]
    assert "random_decoder 0.5" in labels
