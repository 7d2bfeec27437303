"""Rows of chat and prompt/completion data, rendered as the model is to read them, and which parts it is to learn."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenwise.comparison.rows import Findings, Responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = (("messages",), ("prompt", "completion"), ("question", "answer"))
"""The fields of a row, in one of these forms."""
_FORMS = "messages; prompt and completion; or question and answer"
_ROLES = ("system", "user", "assistant")


class _Unusable(ValueError):
    """A row that cannot be used: the message, and the way out."""


@dataclass(frozen=True)
class Conversation:
    """A row as text.

    Args:
        parts: pieces of text in order, each with whether it is to be learnt; the last one is.
        answer: the text of the last response, as the row has it.
    """

    parts: tuple[tuple[str, bool], ...]
    answer: str


def render(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Conversation:
    """A row as text.

    Messages, and question and answer as two of them, are written by the tokenizer's chat template. Without one a turn
    is ``User: ...``, ``Assistant: ...`` (the role, capitalised) with an empty line between turns. Prompt and completion
    follow one another as they are. Without a template each response ends with EOS.

    Raises:
        ValueError: with what is wrong with the row, and the way out.
    """
    form = next((form for form in FORMS if all(row.get(name) is not None for name in form)), None)
    if form is None:
        raise _Unusable(f"has the fields {', '.join(row) or 'none'}", f"Rows have {_FORMS}.")
    if form == ("messages",):
        messages = _messages(row["messages"])
    else:
        prompt, response = (_text(row[name], name) for name in form)
        if form[0] == "prompt":
            return Conversation(((_beginning(tokenizer) + prompt, False), (response + _eos(tokenizer), True)), response)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    parts = _by_template(messages, tokenizer) if tokenizer.chat_template else _plain(messages, tokenizer)
    return Conversation(parts, messages[-1]["content"])


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"field {name!r} holds {type(value).__name__}, not text")
    if name in ("completion", "answer", "content") and not value.strip():
        raise _Unusable("has an empty response", "Leave the row out.")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise _Unusable("field 'messages' is not a list of {role: ..., content: ...}")
    messages = []
    for turn in value:
        role, content = turn.get("role"), turn.get("content")
        if role not in _ROLES:
            raise _Unusable(f"a message has the role {role!r}", f"Roles are {', '.join(_ROLES)}.")
        if not isinstance(content, str):
            raise _Unusable(f"a message's content is {type(content).__name__}, not text")
        if role == "assistant":
            _text(content, "content")
        messages.append({"role": role, "content": content})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise _Unusable("does not end with a response", "The last of two or more messages is the assistant's.")
    return messages


def _plain(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    parts: list[tuple[str, bool]] = []
    before = _beginning(tokenizer)
    for message in messages:
        before += f"{message['role'].capitalize()}:"
        if message["role"] == "assistant":
            parts += [(before, False), (f" {message['content']}{_eos(tokenizer)}", True)]
            before = "\n\n"
        else:
            before += f" {message['content']}\n\n"
    return tuple(parts)


def _by_template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """Responses are what the template adds to the invitation to respond.

    Some templates write an earlier response otherwise once more turns follow; such a response is read, not learnt.
    """

    def written(turns: list[dict[str, str]], invite: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=invite))
        except Exception as error:  # templates raise errors of many kinds of their own
            raise _Unusable(f"the chat template refuses it ({' '.join(str(error).split())})") from error

    whole = written(messages, False)
    parts: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = index == len(messages) - 1
        before = written(messages[:index], True)
        after = whole if last else written(messages[: index + 1], False)
        if whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after):
            parts += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        elif last:
            refused = "the chat template does not begin a response as it invites one"
            raise _Unusable(refused, "Write the rows as prompt and completion.")
    return tuple(parts)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """BOS where the tokenizer itself begins texts with it."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token) if tokenizer.eos_token is not None else ""


def read_responses(
    records: Iterable[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    findings: Findings,
) -> Responses:
    """Rows as token ids; those that cannot be used are told to `findings`.

    A row is cut behind `max_length` tokens, and left out when no response is left then.

    Args:
        records: rows, each with where it stands.
        tokenizer: makes the token ids, of each part by itself: a model writes a response after a whole prompt.
        max_length: tokens of a row, at most.
        findings: gets what is wrong.
    """
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    ends, prompts, answers = [], [], []
    weighted, cut, left_out = True, 0, 0
    begun: dict[bool, str] = {}
    for where, row in records:
        try:
            if not isinstance(row, Mapping):
                raise _Unusable(f"holds {type(row).__name__}, not an object", f"Rows have {_FORMS}.")
            conversation = render(row, tokenizer)
            pieces = [
                tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text, _ in conversation.parts
            ]
            own = [token for piece in pieces for token in piece]
            own_weights = row_weights(row, len(own))
        except _Unusable as problem:
            findings.add(where, f"{problem.args[0]}.", *problem.args[1:])
            continue
        begun[own_weights is not None] = where
        learnt = [
            token if learn else -100
            for piece, (_, learn) in zip(pieces, conversation.parts, strict=True)
            for token in piece
        ]
        cut += len(own) > max_length
        own, learnt = own[:max_length], learnt[:max_length]
        if all(label == -100 for label in learnt[1:]):
            left_out += 1
            continue
        ids += own
        labels += learnt
        weights += (own_weights or [])[:max_length]
        weighted = weighted and own_weights is not None
        ends.append(len(ids))
        prompts.append(min(sum(map(len, pieces[:-1])), max_length))
        answers.append(conversation.answer)
    if len(begun) == 2:
        findings.add(begun[False], f"has no weight, while {begun[True]} has one.", "Give all rows one, or none.")
    return Responses(
        np.array(ids, dtype=np.int32),
        np.array(ends, dtype=np.int64),
        np.array(cut - left_out),
        np.array(left_out),
        np.array(labels, dtype=np.int32),
        np.array(weights if weighted else [], dtype=np.float32),
        np.array(prompts, dtype=np.int64),
        np.frombuffer(json.dumps(answers).encode(), dtype=np.uint8),
    )


def row_weights(row: Mapping[str, Any], tokens: int) -> list[float] | None:
    """The row's weight for each of its tokens (``loss_weights``, or one ``weight``), or None.

    Raises:
        ValueError: with what is wrong with the row, and the way out.
    """
    if (given := row.get("loss_weights")) is not None:
        if not isinstance(given, list) or not all(_is_weight(value) for value in given):
            raise _Unusable("field 'loss_weights' is not a list of numbers of at least 0")
        if len(given) != tokens:
            message = f"field 'loss_weights' has {len(given)} numbers for {tokens} tokens"
            raise _Unusable(message, "Give one for each token of prompt and response, special ones included.")
        return [float(value) for value in given]
    if (weight := row.get("weight")) is not None:
        if not _is_weight(weight):
            raise _Unusable(f"field 'weight' holds {weight!r}, not a number of at least 0")
        return [float(weight)] * tokens
    return None


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def final_answer(text: str, marked: bool) -> str:
    """The part of a response that is compared: what follows the last ``####``, or else all of it, without margins.

    Args:
        text: the response.
        marked: whether the expected response has that mark. A text without it then has no answer; thousands separators
            in the answer do not count.
    """
    if not marked:
        return text.strip()
    _, mark, answer = text.rpartition("####")
    return answer.strip().replace(",", "") if mark else ""
