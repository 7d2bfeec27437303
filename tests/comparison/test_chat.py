import numpy as np
import pytest

from tokenwise.comparison.chat import final_answer, read_responses, render
from tokenwise.comparison.rows import Findings
from tokenwise.models.load import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture
def tokenizer():
    return train_tokenizer(["What is two and two? It is four."] * 3, 270)


def read(tokenizer, rows, max_length=64):
    findings = Findings("data")
    records = [(f"row {number}", row) for number, row in enumerate(rows)]
    return read_responses(records, tokenizer, max_length, findings), [str(found) for found in findings.problems()]


def learnt(rows, tokenizer, index=0):
    labels = rows.labels[rows.span(index)]
    return tokenizer.decode(labels[labels != -100])


def test_without_a_template_turns_are_written_plainly_and_responses_end_with_eos(tokenizer):
    found = render({"messages": TURNS}, tokenizer)
    assert found.parts == (
        ("User: Hi\n\nAssistant:", False),
        (" Hello<|endoftext|>", True),
        ("\n\nUser: 2+2?\n\nAssistant:", False),
        (" 4<|endoftext|>", True),
    )
    assert found.answer == "4"
    same = render({"question": "2+2?", "answer": "4"}, tokenizer)
    assert same.parts == render({"messages": TURNS[2:]}, tokenizer).parts
    assert render({"prompt": "a ", "completion": "b"}, tokenizer).parts == (("a ", False), ("b<|endoftext|>", True))


def test_a_template_decides_what_a_response_is(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert render({"messages": TURNS}, tokenizer).parts == (
        ("<|user|>Hi<|end|><|assistant|>", False),
        ("Hello<|end|>", True),
        ("<|user|>2+2?<|end|><|assistant|>", False),
        ("4<|end|>", True),
    )


def test_an_earlier_response_that_the_template_rewrites_is_read_and_the_last_one_learnt(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ '(last)' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    )
    parts = render({"messages": TURNS}, tokenizer).parts
    assert parts == (
        ("<|user|>Hi<|end|><|assistant|>Hello<|end|><|user|>2+2?<|end|><|assistant|>", False),
        ("(last)4<|end|>", True),
    )
    tokenizer.chat_template = TEMPLATE.replace("<|assistant|>", "<|other|>")
    _, problems = read(tokenizer, [{"messages": TURNS}])
    assert "does not begin a response as it invites one" in problems[0]


def test_only_responses_have_labels_and_a_row_is_cut_at_its_end(tokenizer):
    rows, problems = read(tokenizer, [{"messages": TURNS}, {"prompt": "x" * 80, "completion": "y"}], max_length=75)
    assert problems == []
    assert len(rows) == 1
    assert (int(rows.cut), int(rows.left_out)) == (0, 1)
    assert learnt(rows, tokenizer) == " Hello<|endoftext|> 4<|endoftext|>"
    span = rows.span(0)
    whole = tokenizer.decode(rows.input_ids[span])
    assert whole.startswith("User: Hi\n\nAssistant: Hello")
    prompt = rows.input_ids[: rows.prompts[0]]
    assert tokenizer.decode(prompt).endswith("Assistant:")
    assert rows.expected == ["4"]
    windows = rows.windows(0)
    assert np.array_equal(windows.input_ids[0], rows.input_ids[span])
    assert np.array_equal(windows.labels[0], rows.labels[span])
    short, _ = read(tokenizer, [{"messages": TURNS}], max_length=len(prompt) - 5)
    assert (int(short.cut), int(short.left_out)) == (1, 0)
    assert learnt(short, tokenizer) == " Hello<|endoftext|>"


def test_weights_stand_for_a_row_or_for_its_tokens(tokenizer):
    row = {"prompt": "ab", "completion": "c"}
    count = len(read(tokenizer, [row])[0].input_ids)
    each = [float(n) for n in range(count)]
    rows, problems = read(tokenizer, [{**row, "weight": 0.5}, {**row, "loss_weights": each}])
    assert problems == []
    assert rows.loss_weights.tolist() == [0.5] * count + each
    assert not len(read(tokenizer, [row])[0].loss_weights)
    _, problems = read(tokenizer, [row, {**row, "weight": 1}, {**row, "loss_weights": [1.0]}, {**row, "weight": -1}])
    text = "\n".join(problems)
    assert f"field 'loss_weights' has 1 numbers for {count} tokens" in text
    assert "not a number of at least 0" in text
    assert "row 0: has no weight, while row 1 has one" in text


def test_everything_wrong_with_the_rows_is_told_once(tokenizer):
    rows = [
        *({"prompt": "a"} for _ in range(5)),
        {"prompt": "a", "completion": " "},
        {"question": "a", "answer": 3},
        {"messages": TURNS[:1]},
        {"messages": [{"role": "bot", "content": "a"}]},
        "text",
    ]
    _, problems = read(tokenizer, rows)
    assert len(problems) == 6
    assert problems[0].startswith("data: row 0, row 1, row 2 and 2 more: has the fields prompt.")
    for part in ("empty response", "holds int, not text", "does not end with a response", "role 'bot'", "holds str"):
        assert any(part in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "marked", "answer"),
    [
        ("so\n#### 1,200 ", True, "1200"),
        ("1 #### 2 #### 3", True, "3"),
        ("it is 3", True, ""),
        (" it is 3\n", False, "it is 3"),
    ],
)
def test_the_answer_is_what_follows_the_mark_or_all(text, marked, answer):
    assert final_answer(text, marked) == answer
