"""Weights by message, role, turn or pattern: the columns of a data set from rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tokenwise.errors import InputError, Problem
from tokenwise.method import problems_of

_TRAINED = "assistant"


class Rule(BaseModel):
    """Which characters a weight is for: all conditions together. Of several rules that match, the last counts.

    A rule that names neither a role nor a message speaks of the assistant's messages (in a plain text, of the text).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    weight: float = Field(ge=0)
    """The weight; 0 leaves these tokens without a label."""
    role: str | None = None
    """Role of the message: user, assistant, tool ...; "template" for what the chat template writes before an
    assistant's message; "any" for everything."""
    turn: int | Literal["first", "last"] | None = None
    """Turn of the message, counted from 0 (negative from the end); a turn begins with each of the user's messages."""
    message: int | None = None
    """Index of the message, counted from 0 (negative from the end)."""
    pattern: str | None = None
    """A regular expression; the weight is for what it matches within one message."""

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
        return value


def segment_weights(
    tokenizer: Any,
    conversation: str | Sequence[Mapping[str, Any]],
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    **template_options: Any,
) -> dict[str, list[Any]]:
    """Tokens, labels and weights of one text or conversation.

    Without rules every token of the assistant's messages weighs 1 and all others 0; a plain text weighs 1 throughout.
    A key ``weight`` of a message multiplies what the rules say of it. An assistant's message ends with what the chat
    template writes after it (the end of its turn); what stands before it belongs to the template. A token on the
    border of two weights takes the larger.

    Args:
        tokenizer: a fast tokenizer, for messages with a chat template.
        conversation: a text, or messages with ``role`` and ``content``, in any number.
        rules: `Rule` objects, or mappings with their fields.
        template_options: given to the chat template: tools, documents and the like.

    Returns:
        ``input_ids``, ``labels`` (-100 where the weight is 0) and ``loss_weights``, [tokens] each; ``loss_weights``
        is the column of the method `LossWeights`.

    Raises:
        InputError: when a rule is wrong, the tokenizer gives no offsets, or the chat template writes the beginning of
            a conversation otherwise than the whole one, so that messages cannot be told apart.
    """
    checked = _rules(rules)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(Problem("tokenizer", f"{type(tokenizer).__name__} gives no offsets.", "Use a fast tokenizer."))
    if isinstance(conversation, str):
        # One message of the assistant's, which no template surrounds.
        alone = _Place(_TRAINED, frozenset({0, -1}), frozenset({0, -1, "first", "last"}))
        weights, without_text = _painted(conversation, alone, checked), 1.0
        found = tokenizer(conversation, return_offsets_mapping=True)
    else:
        messages = list(conversation)
        whole = _render(tokenizer, messages, template_options)
        weights, without_text = _weigh_messages(tokenizer, messages, whole, checked, template_options), 0.0
        found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        _check_ids(tokenizer, messages, found["input_ids"], template_options)
    ids = list(found["input_ids"])
    token_weights = [max(weights[start:end], default=without_text) for start, end in found["offset_mapping"]]
    labels = [token if weight else -100 for token, weight in zip(ids, token_weights, strict=True)]
    return {"input_ids": ids, "labels": labels, "loss_weights": token_weights}


@dataclass(frozen=True)
class _Place:
    """Where a piece of a conversation stands, in all the names that rules may give it."""

    role: str
    messages: frozenset[int]
    turns: frozenset[int | str]
    weight: float = 1.0

    def matches(self, rule: Rule) -> bool:
        if rule.role is None and rule.message is None:
            named = self.role == _TRAINED
        else:
            named = rule.role in (None, "any", self.role)
        return (
            named
            and (rule.message is None or rule.message in self.messages)
            and (rule.turn is None or rule.turn in self.turns)
        )


@dataclass(frozen=True)
class _Piece:
    """Characters `start` to `end` of the rendered conversation, and the messages they come from."""

    start: int
    end: int
    messages: range
    is_template: bool = False


def _rules(rules: Sequence[Rule | Mapping[str, Any]]) -> list[Rule]:
    checked, problems = [], []
    for index, rule in enumerate(rules):
        try:
            checked.append(rule if isinstance(rule, Rule) else Rule(**rule))
        except ValidationError as error:
            problems += problems_of(error, Rule, f"rules[{index}]")
    if problems:
        raise InputError(problems)
    return checked


def _weigh_messages(
    tokenizer: Any, messages: list[Mapping[str, Any]], whole: str, rules: list[Rule], options: dict[str, Any]
) -> list[float]:
    """The weight of each character of the rendered conversation."""
    weights = [0.0] * len(whole)
    for piece in _pieces(tokenizer, messages, whole, options):
        text = whole[piece.start : piece.end]
        painted = [_painted(text, _place(messages, index, piece), rules) for index in piece.messages]
        if any(other != painted[0] for other in painted):
            raise InputError(
                Problem(
                    "rules",
                    f"tell messages {piece.messages[0]} to {piece.messages[-1]} apart, which the chat template does "
                    "not.",
                    "Give these messages the same weight, or write system instructions into the user's message.",
                )
            )
        weights[piece.start : piece.end] = painted[0]
    return weights


def _place(messages: list[Mapping[str, Any]], index: int, piece: _Piece) -> _Place:
    beginnings = [i for i, message in enumerate(messages) if message["role"] == "user"]
    turn = max(sum(start <= index for start in beginnings) - 1, 0)
    turns: set[int | str] = {turn, turn - max(len(beginnings), 1)}
    turns |= {name for name, number in (("first", 0), ("last", max(len(beginnings), 1) - 1)) if number == turn}
    if piece.is_template:
        return _Place("template", frozenset(), frozenset(turns))
    message = messages[index]
    return _Place(
        message["role"], frozenset({index, index - len(messages)}), frozenset(turns), float(message.get("weight", 1.0))
    )


def _painted(text: str, place: _Place, rules: list[Rule]) -> list[float]:
    """The weight of each character of one piece."""
    weights = [float(place.role == _TRAINED)] * len(text)
    for rule in rules:
        if place.matches(rule):
            found = [(0, len(text))] if rule.pattern is None else [m.span() for m in re.finditer(rule.pattern, text)]
            for start, end in found:
                weights[start:end] = [rule.weight] * (end - start)
    return [weight * place.weight for weight in weights]


def _pieces(tokenizer: Any, messages: list[Mapping[str, Any]], whole: str, options: dict[str, Any]) -> list[_Piece]:
    """The rendering cut at the messages, an assistant's also where the template gives it the word.

    Neighbouring messages that are not the assistant's are one piece where the template cannot render the first alone.
    """
    pieces = []
    start, first = 0, 0
    for index, message in enumerate(messages):
        is_last = index + 1 == len(messages)
        is_trained = message["role"] == _TRAINED
        rendered = whole if is_last else _try(tokenizer, messages[: index + 1], options)
        if rendered is None or not whole.startswith(rendered) or len(rendered) < start:
            if is_trained or messages[index + 1]["role"] == _TRAINED:
                raise _unstable(index)
            continue
        content = start
        if is_trained:
            opened = _try(tokenizer, messages[:index], options, add_generation_prompt=True)
            if opened is None or not rendered.startswith(opened) or len(opened) < start:
                raise _unstable(index)
            content = len(opened)
            pieces.append(_Piece(start, content, range(index, index + 1), is_template=True))
        pieces.append(_Piece(content, len(rendered), range(first, index + 1)))
        start, first = len(rendered), index + 1
    return pieces


def _unstable(index: int) -> InputError:
    return InputError(
        Problem(
            "tokenizer.chat_template",
            f"writes the conversation up to message {index} otherwise than the whole one begins, so that the messages' "
            "borders are unknown (templates that drop earlier reasoning do this).",
            "Use a template made for training (TRL's get_training_chat_template, for some models), train on one turn "
            "at a time, or render the text yourself and give patterns.",
        )
    )


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the chat template knows them."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: dict[str, Any], **more: Any) -> str:
    return str(tokenizer.apply_chat_template(_plain(messages), tokenize=False, **options, **more))


def _try(tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: dict[str, Any], **more: Any) -> str | None:
    """The rendering, or None where the template refuses such a beginning."""
    try:
        return _render(tokenizer, messages, options, **more)
    except (jinja2.TemplateError, IndexError):
        return None


def _check_ids(tokenizer: Any, messages: list[Mapping[str, Any]], ids: list[int], options: dict[str, Any]) -> None:
    theirs = tokenizer.apply_chat_template(_plain(messages), tokenize=True, return_dict=True, **options)["input_ids"]
    if list(theirs) != list(ids):
        raise InputError(
            Problem(
                "tokenizer",
                "gives the rendered conversation other tokens than apply_chat_template does.",
                "Check add_special_tokens in the tokenizer's settings.",
            )
        )
