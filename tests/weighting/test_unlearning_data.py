"""Examples as tokens, pairs of what to forget and to keep, batches of both, recall."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tokenwise.errors import InputError
from tokenwise.models.load import train_tokenizer
from tokenwise.weighting.unlearning_data import UnlearningCollator, example, pair, read_examples
from tokenwise.weighting.unlearning_run import recall

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Question: who?\nAnswer: me"] * 3, vocab_size=270)


def parts(row, tokenizer):
    """What is asked and what is answered, as text."""
    labels = row["labels"]
    first = next(index for index, label in enumerate(labels) if label != -100)
    assert labels[first:] == row["input_ids"][first:]
    return tokenizer.decode(row["input_ids"][:first]), tokenizer.decode(row["input_ids"][first:])


@pytest.mark.parametrize(
    ("record", "asked", "answered"),
    [
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2"),
        ({"question": "who?", "answer": "me"}, "Question: who?\nAnswer:", " me"),
        ({"text": "all of it"}, "", "all of it"),
    ],
)
def test_labels_are_on_the_answer_and_its_end(record, asked, answered, tokenizer):
    row = example(record, tokenizer)
    assert parts(row, tokenizer) == (asked, answered + tokenizer.eos_token)


def test_conversations_go_through_the_chat_template(tokenizer):
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    with pytest.raises(InputError, match="needs a chat template"):
        example({"messages": turns}, tokenizer)
    tokenizer.chat_template = TEMPLATE
    try:
        for record in ({"messages": turns}, {"question": "who?", "answer": "me"}):
            assert parts(example(record, tokenizer), tokenizer) == ("<user>who?<assistant>", "me" + tokenizer.eos_token)
        with pytest.raises(InputError, match="no conversation that ends with the assistant"):
            example({"messages": turns[:1]}, tokenizer)
    finally:
        tokenizer.chat_template = None


def test_what_cannot_be_read_is_named_line_by_line(tokenizer, tmp_path):
    file = tmp_path / "forget.jsonl"
    lines = [
        '{"prompt": "a"}',
        "no json",
        '{"question": "a", "answer": 3}',
        "[1]",
        '{"prompt": "a b c", "completion": "d"}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_examples(file, tokenizer, max_length=2, field="--forget")
    shown = [str(problem) for problem in caught.value.problems]
    for number, words in enumerate(
        (
            "has prompt. Give it prompt and completion",
            "is not JSON",
            "is int",
            "is not a JSON object",
            "no answer token left",
        ),
        1,
    ):
        assert f"--forget (forget.jsonl:{number})" in shown[number - 1]
        assert words in shown[number - 1]
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no example"):
        read_examples(file, tokenizer)
    with pytest.raises(InputError, match=r"Did you mean .*forget\.jsonl"):
        read_examples(tmp_path / "forgot.jsonl", tokenizer)


def rows(start, lengths):
    return [{"input_ids": [start + i] * n, "labels": [-100, *[start + i] * (n - 1)]} for i, n in enumerate(lengths)]


@pytest.mark.parametrize("anchor", ["forget", "retain"])
def test_every_partner_comes_equally_often_and_another_order_each_epoch(anchor):
    forget, retain = rows(10, [2, 3, 4, 5]), rows(30, [3] * 6)
    pairs = pair(forget, retain, anchor=anchor, seed=1)
    length, others = (4, 6) if anchor == "forget" else (6, 4)
    assert len(pairs) == length
    seen, orders = [], []
    for epoch in range(others):
        pairs.set_epoch(epoch)
        found = [pairs[index]["input_ids"] for index in range(length)]
        assert [pairs[index]["input_ids"] for index in range(length)] == found
        own, other = (0, 1) if anchor == "forget" else (1, 0)
        assert [ids[own][0] for ids in found] == [row["input_ids"][0] for row in (forget, retain)[own]]
        orders.append(tuple(ids[other][0] for ids in found))
        seen += orders[-1]
    assert len(set(orders)) > 1
    assert all(seen.count(value) == length for value in set(seen))
    assert len(set(seen)) == others
    assert pairs[0]["forget"][0][0] == 1
    assert set(pairs[0]["forget"][1]) == {0}


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_become_rows_of_one_batch(side):
    pairs = pair(rows(10, [2, 4]), rows(30, [3]))
    batch = UnlearningCollator(7, side)([pairs[0], pairs[1]])
    assert batch["input_ids"].shape == (4, 4)
    real = batch["attention_mask"].bool()
    assert real.sum(1).tolist() == [2, 3, 4, 3]
    assert real[0].tolist() == ([True] * 2 + [False] * 2 if side == "right" else [False] * 2 + [True] * 2)
    assert (batch["input_ids"][~real] == 7).all()
    assert (batch["labels"][~real] == -100).all()
    assert batch["forget"][real].tolist() == [1] * 2 + [0] * 3 + [1] * 4 + [0] * 3
    single = UnlearningCollator(7, side)([{**row, "forget": [1] * len(row["input_ids"])} for row in rows(10, [2, 4])])
    assert single["input_ids"].shape == (2, 4)


def test_unusable_rows_are_refused():
    with pytest.raises(InputError, match=r"(?s)forget: holds no row.*retain: has no column 'labels'"):
        pair([], [{"input_ids": [1]}])
    with pytest.raises(InputError, match="neither 'forget' nor 'retain'"):
        pair(rows(1, [2]), rows(1, [2]), anchor="both")


def test_recall_is_what_generation_gives(tiny_llama):
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index in range(4):
        prompt = torch.randint(1, 64, (3,), generator=generator)
        answer = tiny_llama.generate(prompt[None], max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:]
        if index % 2:
            answer[2] = (answer[2] + 1) % 64
        examples.append({"input_ids": [*prompt.tolist(), *answer.tolist()], "labels": [-100] * 3 + answer.tolist()})
    json.dumps(examples)
    tiny_llama.train()
    found = recall(tiny_llama, examples, 0, batch_size=3)
    assert tiny_llama.training
    assert found.exact == 0.5
    nll = []
    for row in examples:
        logits = tiny_llama(torch.tensor([row["input_ids"]])).logits[0, 2:-1]
        nll.append(F.cross_entropy(logits, torch.tensor(row["input_ids"][3:])))
    assert found.nll == pytest.approx(sum(nll).item() / 4, rel=1e-4)
    assert found.probability == pytest.approx(sum(value.neg().exp() for value in nll).item() / 4, rel=1e-4)
    assert found.examples == 4
