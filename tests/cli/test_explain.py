import ast
import itertools
import json
import math
import re

import pytest

from tokenwise.cli import explain
from tokenwise.cli.main import main
from tokenwise.errors import InputError


def test_missing_file_is_named(tmp_path, capsys):
    (tmp_path / "text.txt").touch()
    assert main(["explain", "./model", f"@{tmp_path / 'texd.txt'}", "--method", "uniform"]) == 2
    assert "text.txt'?" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A tiny random model with its tokenizer."""
    from tokenwise.models.load import make_or_load_model, train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n"] * 3, vocab_size=280)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 32, **sizes}
    make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_weights_are_drawn_and_written(saved_model, tmp_path, capsys):
    text, page = "def add(first):\n    return 1", tmp_path / "page.html"
    arguments = ["--method", "top_entropy", "-p", "keep=0.25", "--html", str(page)]
    assert main(["explain", saved_model, text, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"top_entropy (keep 0.25) on {saved_model}"
    rows = [line.split(maxsplit=2) for line in lines[2:-2]]
    assert "".join(ast.literal_eval(token) for _, _, token in rows) == text
    assert rows[0][0] == "-"
    weights = [float(weight) for weight, _, _ in rows[1:]]
    assert set(weights) == {0.0, 1.0}
    # At or above the interpolated quantile.
    assert sum(weights) == math.floor(0.25 * (len(weights) - 1) + 1e-9) + 1
    assert "<h1>top_entropy (keep 0.25) on" in page.read_text(encoding="utf-8")


def test_uniform_weighs_every_token_one(saved_model):
    view = explain.explain(saved_model, "def add", "uniform", {})
    assert view.weights == [None] + [1.0] * (len(view.tokens) - 1)
    assert all(loss > 0 for loss in view.nll[1:])


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("x", [], "at least two"),
        ("x y z " * 30, [], "reads at most 32"),
        ("def add", ["-p", "kep=0.5"], "Did you mean 'keep'?"),
        ("def add", ["-p", "keep=0"], "must|greater"),
    ],
)
def test_unusable_input_is_one_clear_message(saved_model, capsys, text, arguments, message):
    assert main(["explain", saved_model, text, "--method", "top_entropy", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.out == ""


def test_missing_model_is_named(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "absent"), "some text", "--method", "uniform"]) == 2
    assert "absent" in capsys.readouterr().err


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return 1 + 23"}]}


@pytest.fixture(scope="module")
def chat_model(saved_model, tmp_path_factory):
    """The same model, with a chat template and room for a chat."""
    from transformers import AutoTokenizer

    from tokenwise.models.load import make_or_load_model

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": 128, **sizes}
    make_or_load_model({"config": config}, seed=0, tokenizer=tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def weighted_text(view):
    """The text of the tokens that have a weight, and of those that have none."""
    pairs = list(zip(view.tokens, view.weights, strict=True))
    return tuple(
        "".join(text for text, weight in pairs if (weight is None) == is_prompt) for is_prompt in (False, True)
    )


def test_only_the_responses_of_a_chat_have_weights(chat_model, tmp_path, capsys):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.html"
    rows.write_text(json.dumps(CHAT) + '\n{"never": "read"}\n', encoding="utf-8")
    assert main(["explain", chat_model, "--chat", str(rows), "--method", "uniform", "--html", str(page)]) == 0
    shown = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:-2]]
    learnt = "".join(ast.literal_eval(token) for weight, _, token in shown if weight != "-")
    assert learnt == "return 1 + 23<|endoftext|>\n"
    prompt = "".join(ast.literal_eval(token) for weight, _, token in shown if weight == "-")
    assert prompt == "[user] def f<|endoftext|>\n[assistant] "
    assert page.read_text(encoding="utf-8").count('class="prompt" title="read, not learnt"') > 5


def test_prompt_and_completion_are_weighed_apart(chat_model):
    row = {"prompt": "def f", "completion": " return 1"}
    view = explain.explain(chat_model, row, "weighted_instruction_tuning", {})
    weights = view.weights[1:]
    assert weights == [pytest.approx(0.2)] * weights.count(weights[0]) + [pytest.approx(0.8)] * weights.count(
        weights[-1]
    )
    assert weights[0] < weights[-1]


def test_rules_weigh_roles_and_patterns(chat_model):
    rules = [{"role": "assistant", "weight": 1}, {"pattern": "[0-9]+", "weight": 3}]
    view = explain.explain(chat_model, CHAT, "loss_weights", {}, rules)
    assert weighted_text(view)[0].strip() == "return 1 + 23<|endoftext|>"
    heavy = "".join(text for text, weight in zip(view.tokens, view.weights, strict=True) if weight == 3)
    assert heavy.replace(" ", "") == "123"
    asked = {"question": "def f", "answer": "return 1 + 23"}
    assert explain.explain(chat_model, asked, "loss_weights", {}, rules).weights == view.weights
    text = explain.explain(chat_model, "def 12", "loss_weights", {}, [{"pattern": "12", "weight": 5}])
    assert {text.weights[-1], *text.weights[1:]} == {5.0, 1.0}


def test_a_row_brings_its_own_weight(chat_model):
    view = explain.explain(chat_model, {**CHAT, "weight": 2}, "loss_weights", {})
    assert {weight for weight in view.weights if weight is not None} == {2.0}


def test_attention_to_the_prompt_is_shown(chat_model, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([CHAT]), encoding="utf-8")
    arguments = ["--method", "ss_token", "-p", f"reference={chat_model}"]
    assert main(["explain", chat_model, "--chat", str(rows), *arguments]) == 0
    output = capsys.readouterr().out
    assert re.search(r"weight +nats +prompt +token", output)
    shares = [float(line.split()[2]) for line in output.splitlines()[2:-1] if line.split()[0] != "-"]
    # A random model attends evenly: the prompt's share falls with every token of the response.
    assert all(0 < later < earlier < 1 for earlier, later in itertools.pairwise(shares))


@pytest.mark.parametrize(
    ("method", "column"),
    [
        ("loss_weights", "'loss_weights'.*--rules"),
        ("glow", "'sample_id'.*logs"),
        ("token_cleaning", "'base_nll'.*scored"),
        ("weighted_instruction_tuning", "'completion_mask'.*--chat"),
        ("fault_aware_static", "'difference'.*fault_pair"),
        ("ss_token_average", "'prompt_attention'.*--chat"),
        ("ldam", "rows with text and label by --data"),
        ("wagle", "mask_parameters"),
    ],
)
def test_what_a_method_would_miss_is_named_before_the_model_is_looked_for(method, column):
    with pytest.raises(InputError, match=column):
        explain.explain("/no/such/model", "some text", method, {})


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        (CHAT, ["--rules", "[{]"], "--rules.*is not JSON"),
        (CHAT, ["--rules", '{"weight": 1}'], "is not a list of rules"),
        (CHAT, ["--rules", '[{"weight": 0}]'], "leave no predicted token"),
        (CHAT, ["--rules", '[{"wait": 0}]'], "Did you mean 'weight'"),
        ({"messages": ["x"]}, ["--rules", "[]"], "not a list of .role"),
        ({"prompt": "a", "completion": "b"}, ["--rules", "[]"], "need a row with messages"),
        ({**CHAT, "weight": "x"}, [], "not a number of at least 0"),
        ({"text": "x", "weight": 1}, [], "Rows have messages"),
    ],
)
def test_unusable_rows_and_rules_are_one_clear_message(chat_model, tmp_path, capsys, row, arguments, message):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row), encoding="utf-8")
    assert main(["explain", chat_model, "--chat", str(rows), "--method", "loss_weights", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_what_unlearning_does_is_drawn_with_its_sign(chat_model, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--method", "gradient_difference", "-p", "forget_coefficient=0.5", "--html", str(page)]
    assert main(["explain", chat_model, "def add", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "factor: factor of the gradient of the token's loss; below 0 the loss is raised"
    assert lines[2].split() == ["factor", "nats", "token"]
    assert {line.split()[0] for line in lines[4:-2]} == {"-0.5"}
    assert "mean factor -0.5, 0% with a factor above 0, 100% below 0, mean loss" in lines[-2]
    drawn = page.read_text(encoding="utf-8")
    assert 'class="w below" style="--s:100" title="factor -0.5, ' in drawn
    assert "Factor: factor of the gradient" in drawn


@pytest.mark.parametrize(("forget", "weight"), [(True, -1.0), (False, 0.25), (0, 0.25)])
def test_a_row_says_whether_it_is_forgotten_or_kept(chat_model, forget, weight):
    fields = {"retain_coefficient": 0.25}
    view = explain.explain(chat_model, {**CHAT, "forget": forget}, "gradient_difference", fields)
    assert {value for value in view.weights if value is not None} == {weight}
    assert weighted_text(view)[1] == "[user] def f<|endoftext|>\n[assistant] "


def test_what_is_no_factor_is_drawn_as_the_gradient_at_the_logits(chat_model, capsys):
    assert main(["explain", chat_model, "def add(first)", "--method", "ceu", "-p", "skip=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("gradient: norm of the gradient at the token's logits; below 0 the token is made less")
    found = [float(line.split()[0]) for line in lines[4:-1]]
    assert found[:2] == [0, 0]
    assert all(-1.5 < value < 0 for value in found[2:])


def test_forget_is_yes_or_no(chat_model):
    with pytest.raises(InputError, match="'forget' holds 'some'"):
        explain.explain(chat_model, {**CHAT, "forget": "some"}, "npo", {})
    with pytest.raises(InputError, match=r"'reference_nll'.*column of a scored"):
        explain.explain(chat_model, CHAT, "npo", {"reference": "reference_nll"})


def test_a_text_or_a_chat_is_needed(tmp_path, capsys):
    assert main(["explain", "./model", "--method", "uniform"]) == 2
    assert main(["explain", "./model", "text", "--chat", "rows.jsonl", "--method", "uniform"]) == 2
    assert main(["explain", "./model", "text", "--data", "rows.jsonl", "--method", "uniform"]) == 2
    assert capsys.readouterr().err.count("not more than one") == 3
    plain = tmp_path / "rows.txt"
    plain.write_text("text", encoding="utf-8")
    assert main(["explain", "./model", "--chat", str(plain), "--method", "uniform"]) == 2
    assert "neither .json nor .jsonl" in capsys.readouterr().err
