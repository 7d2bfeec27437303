"""`tokenwise explain --data`: examples of a classifier, drawn."""

import json
import re

import pytest
from rich.console import Console

from tokenwise.cli.example_view import ExampleRow, ExampleView, print_examples
from tokenwise.cli.explain_examples import explain_examples
from tokenwise.cli.main import main

ROWS = [{"text": f"the order number {index} came", "label": "fine" if index % 4 else "complaint"} for index in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def save(folder, **options):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from tokenwise.models.load import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([row["text"] for row in ROWS], vocab_size=300)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    names = {"id2label": {0: "fine", 1: "complaint"}, "label2id": {"fine": 0, "complaint": 1}}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape, **names, **options)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(folder):
    return save(folder / "classifier")


@pytest.fixture(scope="module")
def data(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_weights_of_examples_are_drawn_and_written(classifier, data, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--data", str(data), "--method", "inverse_frequency", "--html", str(page)]
    assert main(["explain", classifier, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"inverse_frequency on {classifier}"
    assert lines[1].startswith("weight: size of the gradient at the example's logits, relative to plain")
    assert lines[2].split() == ["weight", "nats", "label", "text"]
    # Six of one class and two of the other were counted: 1/6 and 1/2, scaled to a mean of 1.
    shown = [line.split(maxsplit=3) for line in lines[3:11]]
    assert [(row[0], row[2]) for row in shown] == [
        ("0.5", "fine") if index % 4 else ("1.5", "complaint") for index in range(8)
    ]
    assert shown[3][3] == "the order number 3 came"
    assert lines[11].startswith("8 examples, mean weight 0.75, of complaint 1.5, of fine 0.5, mean loss ")
    drawn = page.read_text(encoding="utf-8")
    assert drawn.count('style="--s:100">1.5</td>') == 2
    assert drawn.count('style="--s:33">0.5</td>') == 6
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", drawn)


def test_counts_of_the_training_data_may_be_given(classifier, data, capsys):
    arguments = ["--data", str(data), "--method", "inverse_frequency", "-p", "counts=[99, 1]"]
    assert main(["explain", classifier, *arguments]) == 0
    assert "of complaint 1.98, of fine 0.02" in capsys.readouterr().out


def test_classes_by_number_and_a_method_that_learns(classifier, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "it came " * 40, "label": 0}, {"text": "late", "label": 1}]), encoding="utf-8")
    assert main(["explain", classifier, "--data", str(path), "--method", "storm"]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert "1 cut to what the model reads, as at the start of a training" in summary
    assert "mean weight 1," in summary


def test_only_the_first_are_drawn_and_all_are_counted(classifier, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "fine", "label": "fine"}] * 90 + [{"text": "bad", "label": "complaint"}] * 10
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    view = explain_examples(classifier, path, "inverse_frequency", {})
    assert len(view.rows) == 50
    assert view.rows[0].weight == pytest.approx(0.2)
    assert view.summary().startswith("the first 50 of 100 examples, mean weight 0.2, mean loss")


def test_several_labels(folder, tmp_path):
    model = save(folder / "several", problem_type="multi_label_classification")
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one", "label": ["fine", "complaint"]}, {"text": "two", "label": []}, {"text": "x", "label": [1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    view = explain_examples(model, path, "class_uniform", {})
    assert [row.label for row in view.rows] == ["fine, complaint", "none", "complaint"]
    assert [row.weight for row in view.rows] == pytest.approx([1, 1, 1])
    path.write_text('{"text": "one", "label": "fine"}', encoding="utf-8")
    with pytest.raises(ValueError, match="texts have several labels"):
        explain_examples(model, path, "class_uniform", {})
    path.write_text('{"text": "one", "label": ["fine"]}', encoding="utf-8")
    with pytest.raises(ValueError, match="has several labels per example, Storm knows one"):
        explain_examples(model, path, "storm", {})


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        ({"text": "x"}, "class_uniform", "has no field 'label'; it has text"),
        ({"text": "x", "labl": 1}, "class_uniform", "Did you mean 'labl'"),
        ({"text": "x", "label": "compliant"}, "class_uniform", "Did you mean 'complaint'"),
        ({"text": "x", "label": 2}, "class_uniform", "label 2 .* 2 classes. Known: fine, complaint; or 0 to 1"),
        ({"text": 3, "label": 1}, "class_uniform", "holds 3, which is no text"),
        ({"text": "x", "label": 1}, "ldam", "the file has none of fine. Give the counts"),
        ({"text": "x", "label": 1}, "npo", "'npo' is no method of classifiers"),
        (["x"], "ldam", "is no object with text and label"),
    ],
)
def test_unusable_rows_are_one_clear_message(classifier, tmp_path, capsys, row, method, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert main(["explain", classifier, "--data", str(path), "--method", method]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_model_without_a_classifier_is_refused(tmp_path, data, capsys):
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "model"
    )
    assert main(["explain", str(tmp_path / "model"), "--data", str(data), "--method", "class_uniform"]) == 2
    assert "has no classifier of texts (BertModel)" in capsys.readouterr().err


def test_weights_are_coloured_where_there_are_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    view = ExampleView("half", [ExampleRow("a [b]", "x", 2.0, 1.0), ExampleRow("c\nd", "y", None, 0.0)], 2)
    console = Console(width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        print_examples(console, view)
    assert re.search(r"\x1b\[30;48;2;255;138;40m +2\x1b\[0m +1  x +a \[b\]", capture.get())
    assert re.search(r" -  +0  y +c d", capture.get())
