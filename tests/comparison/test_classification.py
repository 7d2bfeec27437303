import numpy as np
import pytest
import torch
from small_plans import classification_task, lines, problems, word_rows, write_plan
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from tokenwise.cli.main import main
from tokenwise.comparison import classification
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.report import write_report
from tokenwise.comparison.rows import Examples
from tokenwise.comparison.tasks import TASKS
from tokenwise.method import Handle
from tokenwise.models.load import load_tokenizer, make_or_load_classifier

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
LLAMA = {**LLAMA, "num_attention_heads": 2, "max_position_embeddings": 64}
METHODS = ["uniform", "./own.py:Plain"]


@pytest.fixture
def folder(tmp_path):
    lines(tmp_path / "train.jsonl", word_rows(0, 40))
    lines(tmp_path / "eval.jsonl", word_rows(40, 64))
    return tmp_path


def run(folder, plan):
    """All jobs of a plan, in this process."""
    plan.prepare(folder / "out")
    run_job = TASKS["classification"].run
    return [run_job(job, folder / "out" / job.key, lambda event: None) for job in plan.jobs(folder / "out")]


def test_from_plan_to_answer_and_report(folder):
    budget = {"unit": "steps", "amount": 40}
    plan = read_plan(write_plan(folder, classification_task(), METHODS, budget=budget))
    results = run(folder, plan)
    assert [result.status for result in results] == ["finished"] * 2
    uniform, plain = results
    assert uniform.quality == plain.quality
    assert uniform.quality.names == ["common", "rare"]
    assert uniform.quality.value == 0  # two words tell the classes apart
    assert uniform.costs.tokens_trained is None
    assert uniform.costs.tokens_seen > 40 * 4
    assert uniform.costs.steps == 40
    assert uniform.curve[-1].held_out == uniform.quality.value
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out" / uniform.job.key / "model")
    assert model.config.label2id == {"common": 0, "rare": 1}

    summary = {**plan.summary(), "seeds": [0], "budget": "", "folder": "", "command": ""}
    assert summary["task"] == "classification, texts of at most 32 tokens"
    conclusion = conclude(results, summary)
    assert "The rarest class has 6 held-out examples" in " ".join(conclusion.notes)
    write_report(folder / "report.html", conclusion, results, "plan", summary)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for part in (
        "Macro-averaged error",
        "percentage points",
        "By class",
        "Log-loss",
        "6 of the rarest",
        "recall 100.0",
    ):
        assert part in page


def test_a_decoder_is_measured_as_without_padding(folder):
    task = classification_task(model={"config": LLAMA, "tokenizer": {"train": "byte_bpe", "vocab_size": 280}})
    plan = read_plan(write_plan(folder, task, METHODS))
    plan.prepare(folder / "out")
    job = plan.jobs(folder / "out")[0]
    rows, tokenizer = Examples.load(job.task["held_out_rows"]), load_tokenizer(job.task["tokenizer"])
    model = make_or_load_classifier(job.task["model"], 0, tokenizer, rows.names.tolist())
    again = make_or_load_classifier(job.task["model"], 0, tokenizer, rows.names.tolist())
    assert torch.equal(model.score.weight, again.score.weight)
    quality, _ = classification.HeldOutExamples(rows, tokenizer.pad_token_id, "fp32").measure(model.train())
    assert model.training
    model.eval()
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.input_ids[rows.span(index)]).long()[None]
        with torch.no_grad():
            logits = model(ids).logits
        loss = F.cross_entropy(logits, torch.tensor([quality.labels[index]])).item()
        assert quality.log_loss[index] == pytest.approx(loss, abs=1e-5)
        assert quality.predictions[index] == int(logits.argmax())


def test_a_step_of_several_micro_batches_is_one_of_their_mean(folder, monkeypatch):
    def trained(**training):
        training = {"learning_rate": 1e-2, "evaluations": 1, **training}
        results = run(folder, read_plan(write_plan(folder, classification_task(), METHODS, training=training)))
        return results[0].quality.log_loss

    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, values: values)
    whole, parts = trained(batch_size=8), trained(batch_size=4, accumulate=2)
    assert whole == pytest.approx(parts, rel=1e-3)


def test_a_loss_over_classes_gets_the_counts_and_its_trainer(folder, monkeypatch):
    seen = []

    def weigh(trainer, method):
        seen.append((method.counts, trainer))
        return Handle()

    monkeypatch.setattr(classification, "weigh", weigh)
    plan = read_plan(write_plan(folder, classification_task(), ["uniform", "./own.py:Objective"]))
    result = run(folder, plan)[1]
    assert result.status == "finished"
    assert [counts for counts, _ in seen] == [(30, 10)] * 2
    # How far the training is can be read off the state, although nobody knows the number of steps beforehand.
    state = seen[1][1].state
    assert state.global_step == 3
    assert state.max_steps < 10


def test_evaluations_on_the_way_see_every_class(folder, monkeypatch):
    monkeypatch.setattr(classification, "CURVE_EXAMPLES", 4)
    plan = read_plan(write_plan(folder, classification_task(), METHODS))
    plan.prepare(folder / "out")
    rows = Examples.load(plan.jobs(folder / "out")[0].task["held_out_rows"])
    held_out = classification.HeldOutExamples(rows, 0, "fp32")
    assert np.bincount(rows.classes[held_out._start]).tolist() == [2, 2]


def test_everything_wrong_with_the_data_is_told_at_once_with_exit_code_2(folder, capsys):
    train = [*word_rows(0, 8), {"text": "a"}, {"text": "", "label": "rare"}, {"text": "a", "label": 1.5}, [1]]
    lines(folder / "train.jsonl", train)
    lines(folder / "eval.jsonl", [{"text": "a", "label": "raer"}, {"text": "a", "label": "common"}])
    write_plan(folder, classification_task(), METHODS)
    assert main(["compare", str(folder / "plan.yaml"), "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    for part in (
        "line 9: has no field 'label'; it has text.",
        "line 10: field 'text' holds no text.",
        "line 11: field 'label' holds 1.5, neither text nor a whole number.",
        "line 12: holds list, not an object.",
        "line 1: the label 'raer' does not occur in the training data.",
        "Did you mean 'rare'?",
        "there is no example of 'rare'",
    ):
        assert part in error, part


def test_what_does_not_fit_the_task_is_told(folder):
    write_plan(
        folder, classification_task(), ["uniform", "dynamic_loss"], budget={"unit": "tokens_trained", "amount": 9}
    )
    found = "\n".join(problems(folder))
    assert "'weighting/dynamic_loss' gives weights of tokens; classification compares losses over the classes" in found
    assert "Compare it in a task of kind language_modeling." in found
    assert "budget.unit: classification does not count tokens trained on." in found
    lines(folder / "train.jsonl", [{"text": "a", "label": 7}] * 3)
    write_plan(folder, classification_task(), METHODS)
    assert any("all rows have the label 7." in problem for problem in problems(folder))


def test_whole_numbers_are_classes_in_their_order(folder):
    rows = [{"text": f"t{n}", "label": n % 12} for n in range(48)]
    lines(folder / "train.jsonl", rows)
    lines(folder / "eval.jsonl", rows)
    plan = read_plan(write_plan(folder, classification_task(), METHODS))
    plan.prepare(folder / "out")
    rows = Examples.load(plan.jobs(folder / "out")[0].task["train_rows"])
    assert rows.names.tolist() == [str(n) for n in range(12)]
    assert rows.classes[:13].tolist() == [*range(12), 0]
