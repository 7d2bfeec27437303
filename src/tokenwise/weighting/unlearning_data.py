"""Data for unlearning: questions and answers as tokens, what to forget paired with what to keep, batches of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tokenwise.errors import InputError, Problem, missing_file
from tokenwise.signals.head import IGNORED

Row = Mapping[str, Any]

FORMS = "prompt and completion, question and answer, messages, or text"


def read_examples(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, field: str = "data"
) -> list[Row]:
    """The examples of a file of JSON lines, as tokens with labels on what is answered.

    Each line has ``prompt`` and ``completion`` (joined as they are), ``question`` and ``answer`` (in the tokenizer's
    chat template, or else as ``Question: ...`` and ``Answer: ...`` on two lines), ``messages`` (of which the last is
    the answer; needs a chat template), or ``text`` (all of it is labelled). The answer ends with the end-of-text
    token where there is one.

    Args:
        path: the file, UTF-8.
        tokenizer: the model's.
        max_length: tokens at most; longer examples are cut at the end.
        field: the field to name in an error.

    Raises:
        InputError: when the file is missing or empty, or for every line that cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(missing_file(field, path))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(Problem(field, f"{str(path)!r} is not UTF-8 text (byte {error.start}).")) from error
    examples: list[Row] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{field} ({path.name}:{number})"
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(Problem(where, f"is not JSON: {error}.", "Write one object a line."))
            continue
        try:
            examples.append(example(record, tokenizer, max_length, where))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    if not examples:
        raise InputError(Problem(field, f"{str(path)!r} holds no example.", "Write one JSON object a line."))
    return examples


def example(
    record: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, field: str = "example"
) -> Row:
    """One record as `read_examples` takes it: ``input_ids`` and ``labels``, lists of equal length.

    Raises:
        InputError: when the record has none of the forms, or nothing to learn or forget.
    """
    prompt, answer = _texts(record, tokenizer, field)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if prompt is None:
        ids = [*tokenizer(answer)["input_ids"], *end]
        before = 0
    else:
        templated = "messages" in record or ("question" in record and tokenizer.chat_template)
        asked = tokenizer(prompt, add_special_tokens=not templated)["input_ids"]
        # Some tokenizers end whatever they are given.
        asked = asked[:-1] if end and asked[-1:] == end and not prompt.endswith(str(tokenizer.eos_token)) else asked
        answered = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [*asked, *answered, *end]
        before = len(asked)
    ids = ids[:max_length]
    labels = [IGNORED] * min(before, len(ids)) + ids[before:]
    if all(label == IGNORED for label in labels[1:]):
        raise InputError(Problem(field, "has no answer token left.", "Give it an answer, or a larger --max-length."))
    return {"input_ids": ids, "labels": labels}


def _texts(record: Any, tokenizer: PreTrainedTokenizerBase, field: str) -> tuple[str | None, str]:
    """What is asked, None for plain text, and what is answered."""
    if not isinstance(record, dict):
        raise InputError(Problem(field, "is not a JSON object.", f"Write one with {FORMS}."))
    if {"prompt", "completion"} <= set(record):
        return _text(record, "prompt", field), _text(record, "completion", field)
    if {"question", "answer"} <= set(record):
        question, answer = _text(record, "question", field), _text(record, "answer", field)
        if tokenizer.chat_template is None:
            return f"Question: {question}\nAnswer:", f" {answer}"
        return _chat(tokenizer, [{"role": "user", "content": question}]), answer
    if "messages" in record:
        messages = record["messages"]
        fits = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
        if not fits or len(messages) < 2 or messages[-1].get("role") != "assistant":
            form = 'Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
            raise InputError(Problem(f"{field}.messages", "is no conversation that ends with the assistant.", form))
        if tokenizer.chat_template is None:
            message = "needs a chat template, which the model's tokenizer does not have."
            raise InputError(Problem(f"{field}.messages", message, "Use prompt and completion."))
        return _chat(tokenizer, messages[:-1]), _text(messages[-1], "content", field)
    if "text" in record:
        return None, _text(record, "text", field)
    has = ", ".join(map(str, record)) or "nothing"
    raise InputError(Problem(field, f"has {has}.", f"Give it {FORMS}."))


def _text(record: Mapping[str, Any], name: str, field: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise InputError(Problem(f"{field}.{name}", f"is {type(value).__name__}, not text."))
    return value


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class Pairs(Dataset[dict[str, Any]]):
    """Each item is two rows, one to forget and one to keep; what `pair` gives."""

    def __init__(self, forget: Sequence[Row], retain: Sequence[Row], anchor: str, seed: int):
        self.forget, self.retain, self.anchor, self.seed = forget, retain, anchor, seed
        self._epoch = 0
        self._orders: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Other partners in every epoch; transformers' Trainer calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.forget if self.anchor == "forget" else self.retain)

    def __getitem__(self, index: int) -> dict[str, Any]:
        other = self.retain if self.anchor == "forget" else self.forget
        partner = other[self._partner(self._epoch * len(self) + index, len(other))]
        own = (self.forget if self.anchor == "forget" else self.retain)[index]
        first, second = (own, partner) if self.anchor == "forget" else (partner, own)
        names = [name for name in first if name in second]
        found = {name: [first[name], second[name]] for name in names}
        lengths = [len(row["input_ids"]) for row in (first, second)]
        # Under a name that the patched model takes, so that the Trainer keeps it.
        return {**found, "forget": [[1] * lengths[0], [0] * lengths[1]]}

    def _partner(self, draw: int, count: int) -> int:
        """Partners in a random order that is new each time all were used; the same for the same seed."""
        turn, place = divmod(draw, count)
        if turn not in self._orders:
            generator = torch.Generator().manual_seed((self.seed << 20) + turn)
            self._orders = {
                **{key: order for key, order in self._orders.items() if key >= turn - 1},
                turn: torch.randperm(count, generator=generator).tolist(),
            }
        return self._orders[turn][place]


def pair(
    forget: Sequence[Row], retain: Sequence[Row], *, anchor: Literal["forget", "retain"] = "forget", seed: int = 0
) -> Pairs:
    """Pair each row to forget with one to keep (or the other way round), for a Trainer with `UnlearningCollator`.

    An epoch goes once through `anchor`; the partners come in random order, each as often as any other.

    Args:
        forget: rows with ``input_ids`` and ``labels``, such as `read_examples` gives; a datasets.Dataset serves too.
        retain: the same.
        anchor: which of them an epoch goes through once.
        seed: of the partners.

    Raises:
        InputError: when one is empty or lacks a column.
    """
    problems = []
    for name, rows in (("forget", forget), ("retain", retain)):
        if len(rows) == 0:
            problems.append(Problem(name, "holds no row."))
        elif missing := [column for column in ("input_ids", "labels") if column not in rows[0]]:
            problems.append(Problem(name, f"has no column {missing[0]!r}.", "Tokenize it first; see read_examples."))
    if anchor not in ("forget", "retain"):
        problems.append(Problem("anchor", f"{anchor!r} is neither 'forget' nor 'retain'."))
    if problems:
        raise InputError(problems)
    return Pairs(forget, retain, anchor, seed)


class UnlearningCollator:
    """Puts rows, or pairs of rows, into one padded batch.

    Args:
        pad_token_id: fills ``input_ids``; ``attention_mask`` is 0 there, labels are -100, other columns 0.
        padding_side: "right" or "left".
    """

    def __init__(self, pad_token_id: int, padding_side: Literal["right", "left"] = "right"):
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, items: Sequence[Row]) -> dict[str, Tensor]:
        rows: list[dict[str, Any]] = []
        for item in items:
            if torch.as_tensor(item["input_ids"][0]).dim():
                count = len(item["input_ids"])
                rows += [{name: values[index] for name, values in item.items()} for index in range(count)]
            else:
                rows.append(dict(item))
        for row in rows:
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED}
        return {
            name: pad_sequence(
                [torch.as_tensor(row[name]) for row in rows],
                batch_first=True,
                padding_value=fills.get(name, 0),
                padding_side=self.padding_side,
            )
            for name in rows[0]
        }
