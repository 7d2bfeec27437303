"""The task in which a trained model remembers less of what it has read: methods are measured at budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PlainValidator, ValidationInfo, model_validator

from tokenwise.comparison.contexts import Contexts, continues, read_contexts
from tokenwise.comparison.formatting import budget, listing, plain
from tokenwise.comparison.reduction_tasks import TrainedModel, trained
from tokenwise.comparison.sections import Files, Section, Whole, shorten
from tokenwise.comparison.task import MeasuredTask, told
from tokenwise.errors import InputError, Problem
from tokenwise.files import write_binary
from tokenwise.method import Method
from tokenwise.models import load
from tokenwise.policies.budget import kept_count, parse_bytes


def _amounts(value: Any, info: ValidationInfo) -> tuple[float, ...]:
    unit = info.data.get("unit")
    if not isinstance(value, list | tuple) or not value:
        raise InputError(Problem("", f"{shorten(value)} is not a list of amounts.", "Write [0.5, 0.25], for example."))
    found, problems = [], []
    for index, amount in enumerate(value):
        try:
            found.append(_amount(amount, unit))
        except ValueError as error:
            problems.append(Problem(f"[{index}]", f"{shorten(amount)} {error}."))
    if len(set(found)) < len(found):
        problems.append(Problem("", "holds an amount more than once."))
    if problems:
        raise InputError(problems)
    return tuple(sorted(found, reverse=True))


def _amount(value: Any, unit: str | None) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if unit == "bytes":
        parsed = parse_bytes(f"{value} bytes" if number else value)
        if parsed is None:
            raise ValueError('is no amount of memory; write "512 MiB", or a number of bytes')
        return float(parsed.split()[0])
    if unit == "tokens":
        if not number or value < 1 or value != int(value):
            raise ValueError("is no number of tokens")
    elif not number or not 0 < value < 1:
        raise ValueError("is no share; it must be above 0 and below 1 (what stays)")
    return float(value)


class CacheAmounts(Section):
    """How much of the cache every method may keep."""

    unit: Literal["keep", "tokens", "bytes"]
    """What is shared: the tokens seen (``keep``, shares of them), or as many ``tokens`` of each layer and head, or
    ``bytes`` of all keys and values of one row."""
    amounts: Annotated[tuple[float, ...], PlainValidator(_amounts)]
    """The budgets that each method is run at: [0.5, 0.25], [256, 64], or ["2 MiB", "512 KiB"]."""

    def keep(self, amount: float) -> float | str:
        """What a method's `keep` is at an amount."""
        return amount if self.unit == "keep" else f"{int(amount)} {self.unit}"

    def named(self, amount: float) -> str:
        """An amount, in words."""
        return f"keep {amount:g}" if self.unit == "keep" else budget(self.unit, amount)

    def short(self, amount: float) -> str:
        """An amount, as it stands behind a method's name."""
        return budget(self.unit, amount)

    def __str__(self) -> str:
        amounts = listing([budget(self.unit, amount) for amount in self.amounts])
        return f"keep {amounts}" if self.unit == "keep" else f"{amounts} of keys and values"


class ContextData(Section):
    """Where the contexts are."""

    eval: Files
    """JSON lines, each {"context": ..., "question": ..., "answer": ...}, with a "depth" from 0 to 1 where the answer's
    place in the context is known; or each {"context": ..., "target": ...}, to measure how well a text is continued."""
    limit: Annotated[Whole, Field(ge=1)] | None = None
    """Measure on so many rows at most, drawn by chance, the same ones every time."""


class LongContext(MeasuredTask):
    """Questions about long contexts are answered, or long texts continued, with less of them in the cache."""

    runs_in: ClassVar[str] = "tokenwise.comparison.long_context"
    family: ClassVar[str] = "cache"
    baseline: ClassVar[str] = "full"
    budgets: ClassVar[type[Section]] = CacheAmounts
    nothing_saved: ClassVar[str] = "cache/full"

    kind: Literal["long_context"]
    """The kind of task."""
    model: Annotated[TrainedModel, PlainValidator(partial(trained, "causal"))]
    """A directory or a hub id of a trained causal language model with its tokenizer."""
    data: ContextData
    """{eval: ...}."""
    question: Literal["visible", "hidden", "both"] = "both"
    """Whether the question is known when a method chooses: ``visible``, it is read with the context; ``hidden``, the
    context alone is read and evicted from, then the question follows. Which method is better may depend on it."""
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 32
    """Tokens that an answer may have."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.continued and {"question", "max_new_tokens"} & self.model_fields_set:
            names = sorted({"question", "max_new_tokens"} & self.model_fields_set)
            message = "means nothing where the data holds no questions, but a target to continue with."
            raise InputError(Problem(f".{name}", message, "Leave it out.") for name in names)
        return self

    @cached_property
    def continued(self) -> bool:
        """Whether texts are continued, and no questions are asked."""
        return continues(self.data.eval, ".data.eval")

    @property
    def ways(self) -> tuple[str, ...]:
        if self.continued:
            return ("",)
        return tuple(way for way in ("visible", "hidden") if self.question in (way, "both"))

    @property
    def described(self) -> str:
        if self.continued:
            return "long context, texts continued"
        how = "visible and hidden while evicting" if self.question == "both" else f"{self.question} while evicting"
        return f"long context, questions {how}, answers of at most {self.max_new_tokens} tokens"

    def settings(self) -> dict[str, Any]:
        return {"limit": self.data.limit, "max_new_tokens": self.max_new_tokens}

    def prepare(self, path: Path) -> None:
        if path.is_file():
            return
        tokenizer = load.load_tokenizer(self.model.directory, "task.model")
        found = read_contexts(self.data.eval, self.data.limit, tokenizer, self.max_new_tokens, "task.data.eval")
        limit = load.max_positions(self.model.config)
        lengths = found.lengths
        longest = int((lengths.sum(1) if found.continuations else lengths[:, :2].sum(1) + self.max_new_tokens).max())
        if limit is not None and longest > limit:
            message = f"the longest row takes {longest} tokens with its answer, and the model has {limit} positions."
            raise InputError(Problem("task.data.eval", message, "Shorten the contexts, or use another model."))
        write_binary(path, found.save)

    def check_prepared(self, path: Path, methods: Mapping[str, Method]) -> None:
        tokens = round(float(Contexts.load(path).lengths[:, 0].mean()))
        problems = []
        for label, method in methods.items():
            keep, protects = method.keep, method.protects  # type: ignore[attr-defined]
            if isinstance(keep, float) and kept_count(keep, tokens) < min(protects, tokens):
                message = f"{keep:g} of a context of {tokens} tokens, the mean, is {kept_count(keep, tokens)}, and it "
                message += f"keeps {protects} whatever their score: it would not be on equal terms."
                fix = "Give it fewer tokens at the beginning, at the end, or in its window; or raise the budget."
                problems.append(Problem(f"methods ({label})", message, fix))
        if problems:
            raise InputError(problems)

    def remark(self, path: Path) -> str:
        found = Contexts.load(path)
        some = f" of {found.total:,}" if found.total > len(found) else ""
        tokens = plain(float(found.lengths[:, 0].mean()), 0)
        what = "texts" if found.continuations else "questions"
        said = f" ({len(found):,}{some} {what}, contexts of {tokens} tokens on average)"
        if found.continuations:
            return said
        tokenizer = load.load_tokenizer(self.model.directory, "task.model")
        template = bool(getattr(tokenizer, "chat_template", None))
        return said + (
            "; written by the tokenizer's chat template"
            if template
            else "; the tokenizer has no chat template: the question follows on a line of its own"
        )

    def unfit(self, methods: Sequence[tuple[str, str, Method, float | None]]) -> list[Problem]:
        import copy

        import torch
        from transformers import AutoModelForCausalLM

        from tokenwise.cache.apply import evict
        from tokenwise.cache.full import Full

        load.check_tokenizer_fits(self.model.config, load.load_tokenizer(self.model.directory, "task.model"))
        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.model.config))
        try:
            evict(empty, Full()).undo()
        except InputError as error:
            raise InputError(Problem("task.model", part.message, part.fix) for part in error.problems) from None
        problems = []
        for label, _, method, _ in methods:
            try:
                evict(empty, method).undo()  # type: ignore[call-overload]
            except InputError as error:
                problems += told(label, error)
        return problems

    @classmethod
    def check_method(cls, method: Method, where: str) -> None:
        if getattr(type(method), "family", None) != "cache":
            raise InputError(Problem(where, f"{method.card.id!r} is no cache policy; this task compares these."))
