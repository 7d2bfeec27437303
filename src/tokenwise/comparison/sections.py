"""The sections of a plan file: their fields, ranges and defaults, and what is wrong with a value, in plain words."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from tokenwise.documents import find_files
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.models import load
from tokenwise.scores.layout import Manifest, is_store

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UNITS = {"tokens_seen": "tokens seen", "tokens_trained": "tokens trained on", "steps": "steps", "flops": "FLOPs"}
"""What a budget can be counted in."""


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is not a number")
    return value


def _files(value: Any, info: ValidationInfo) -> tuple[Path, ...]:
    return tuple(find_files(value, folder_of(info), ""))


def _unique(values: tuple[int, ...]) -> tuple[int, ...]:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"holds {', '.join(twice)} more than once; a repeated seed repeats the same run")
    return values


Whole = Annotated[int, BeforeValidator(_no_boolean)]
Real = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Files = Annotated[tuple[Path, ...], PlainValidator(_files)]
Seeds = Annotated[
    tuple[Annotated[Whole, Field(ge=0, lt=2**32)], ...], Field(min_length=1), AfterValidator(_unique)
]  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)


class NewTokenizer(Section):
    """A tokenizer learnt from the training text."""

    train: Literal["byte_bpe"]
    """The algorithm: byte-level BPE."""
    vocab_size: Annotated[Whole, Field(ge=load.SMALLEST_VOCABULARY)]
    """Tokens, at most."""


@dataclass(frozen=True)
class Model:
    """The model that every method trains.

    Args:
        written: as the plan names it.
        spec: what `make_or_load_model` takes: a local directory, or ``{"config": {...}}``.
        config: its configuration; of a model whose tokenizer is not trained yet, with the vocabulary asked for.
        tokenizer: directory of the tokenizer, or how to train it.
    """

    written: str
    spec: str | dict[str, Any]
    config: PreTrainedConfig
    tokenizer: Path | NewTokenizer

    @property
    def from_scratch(self) -> bool:
        return isinstance(self.spec, dict)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(_model)


def _model(value: Any, info: ValidationInfo) -> Model:
    if isinstance(value, str) and value:
        directory = load.locate(value, folder_of(info), "")
        config = load.read_config(directory, "", _head(info))
        load.check_weights(directory, "")
        load.check_tokenizer_fits(config, load.load_tokenizer(directory, ""), "")
        return Model(value, str(directory), config, directory)
    if isinstance(value, Mapping):
        return _new_model(nested(_NewModel, value, info), _head(info))
    fix = "Write a directory, a hub id, or {config: {...}, tokenizer: ...} for a model made from scratch."
    raise InputError(Problem("", f"{shorten(value)} is not a model.", fix))


def _head(info: ValidationInfo) -> load.Head:
    """What the task's models end with."""
    assert info.context is not None
    return "classification" if info.context.get("head") == "classification" else "causal"


def _new_model(made: _NewModel, head: load.Head) -> Model:
    fields = dict(made.config)
    if isinstance(made.tokenizer, Path):
        config = load.make_config(fields, load.load_tokenizer(made.tokenizer, ".tokenizer"), ".config", head)
    else:
        size = made.tokenizer.vocab_size
        config = load.make_config({"vocab_size": size, **fields}, None, ".config", head)
        if config.get_text_config().vocab_size < size:
            message = f"{config.get_text_config().vocab_size} is too small for a tokenizer of {size} tokens."
            raise InputError(Problem(".config.vocab_size", message, "Leave it out, and it follows the tokenizer."))
    return Model(f"{config.model_type} made from scratch", {"config": fields}, config, made.tokenizer)


def _tokenizer(value: Any, info: ValidationInfo) -> Path | NewTokenizer:
    if isinstance(value, str) and value:
        directory = load.locate(value, folder_of(info), "", weights=False)
        load.load_tokenizer(directory, "")
        return directory
    if isinstance(value, Mapping):
        return nested(NewTokenizer, value, info)
    fix = "Write a directory, or {train: byte_bpe, vocab_size: 2048}."
    raise InputError(Problem("", f"{shorten(value)} is not a tokenizer.", fix))


def _config(fields: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    load.make_config(fields, field="", head=_head(info))
    return fields


class _NewModel(Section):
    config: Annotated[dict[str, Any], AfterValidator(_config)]
    """The model's type and sizes, such as {model_type: llama, hidden_size: 128, ...}."""
    tokenizer: Annotated[Path | NewTokenizer, PlainValidator(_tokenizer)]
    """A directory, or {train: byte_bpe, vocab_size: 2048}."""


class Training(Section):
    """How every method trains."""

    batch_size: Annotated[Whole, Field(ge=1)] = 8
    """Sequences of a micro-batch."""
    accumulate: Annotated[Whole, Field(ge=1)] = 1
    """Micro-batches of an optimizer step."""
    learning_rate: Annotated[Real, Field(gt=0)] | None = None
    """Peak; 1e-3 for a model made from scratch and 5e-5 for an existing one unless given."""
    warmup: Annotated[Real, Field(ge=0, lt=1)] = 0.05
    """Share of the budget over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls afterwards."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """AdamW's."""
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward and backward pass; weights stay in fp32."""
    normalize: Literal["none", "mean"] = "none"
    """Whether every method divides by its own denominator, or by the sum of its weights: steps of equal size."""
    evaluations: Annotated[Whole, Field(ge=1)] = 8
    """How often the held-out loss is taken, evenly over the budget, the end included."""


class Budget(Section):
    """How much every run may spend."""

    unit: Literal["tokens_seen", "tokens_trained", "steps", "flops"]
    """What is counted."""
    amount: Annotated[Real, Field(gt=0)]
    """How much of it."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.unit != "flops" and self.amount != int(self.amount):
            raise InputError(Problem(".amount", f"{self.amount!r} is not a whole number of {self.unit}."))
        return self

    def plain(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"unit": self.unit, "amount": self.amount if self.unit == "flops" else int(self.amount)}

    def __str__(self) -> str:
        amount = f"{self.amount:.3g}" if self.unit == "flops" else f"{int(self.amount):,}"
        return f"{amount} {UNITS[self.unit]}"


def _reference_model(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str) or not value:
        raise InputError(Problem("", f"{shorten(value)} is not a model.", "Write a directory or a hub id."))
    if is_store(folder_of(info) / value):
        raise InputError(Problem("", f"{value!r} holds token scores, not a model.", f"Write scores: {value}"))
    return existing_reference(value, folder_of(info), "")


def _scores(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str) or not value:
        raise InputError(Problem("", f"{shorten(value)} is not a folder of token scores.", "Write its path."))
    return existing_scores(value, folder_of(info), "")


class Reference(Section):
    """A model that methods compare with: trained on data of its own, or an existing one, which costs nothing; or what
    one said of the training data, kept by `tokenwise score`."""

    train_on: Files | None = None
    """Text to train it on: a path, a list of paths or a glob."""
    budget: Budget | None = None
    """Its own budget, where it differs from the plan's."""
    model: Annotated[Path, PlainValidator(_reference_model)] | None = None
    """Instead: a directory or hub id of an existing model."""
    scores: Annotated[Path, PlainValidator(_scores)] | None = None
    """Instead: a folder of token scores of the training data."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.train_on, self.model, self.scores)) != 1:
            raise InputError(Problem("", "needs one of train_on, model and scores.", "Write one of the three."))
        if self.train_on is None and self.budget is not None:
            what = "model exists" if self.model is not None else "scores exist"
            raise InputError(Problem(".budget", f"is not used: the {what} already.", "Leave it out."))
        return self


_References = dict[Annotated[str, Field(min_length=1)], Reference]
SECTIONS: dict[str, Any] = {
    "training": Training,
    "budget": Budget,
    "seeds": Seeds,
    "references": _References,
    "methods": list[Any],
    "baseline": str,
}
"""What stands under each key of a plan, the task apart; methods are built later, from the catalog."""
MISSING = {
    "task": "Write what to learn: {kind: language_modeling, model: ..., data: {train: ..., eval: ...}}.",
    "budget": "Write what every run may spend, such as {unit: tokens_seen, amount: 2000000}.",
    "methods": "Write the methods to compare, such as [uniform, {excess_loss: {keep: 0.6, reference: clean}}].",
}
"""The keys that every plan has, and what to write where one is missing."""


@contextmanager
def collect(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of an InputError to the list and go on."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def folder_of(info: ValidationInfo) -> Path:
    """Where the plan's relative paths start."""
    assert info.context is not None
    return Path(info.context["folder"])


def existing_reference(name: str, folder: Path, where: str) -> Path:
    """The directory of a trained causal language model; an InputError names `where` when there is none."""
    directory = load.locate(name, folder, where)
    load.read_config(directory, where)
    load.check_weights(directory, where)
    return directory


def existing_scores(name: str, folder: Path, where: str) -> Path:
    """The folder of finished token scores with log-probabilities; an InputError names `where` when it is none."""
    path = (folder / Path(name).expanduser()).resolve()
    manifest = Manifest.read(path, where)
    if not manifest.complete:
        message = f"the scores in {str(path)!r} are not finished."
        raise InputError(Problem(where, message, "Run tokenwise score again: it continues where it stopped."))
    if "logp" not in manifest.columns:
        message = f"the scores in {str(path)!r} have no 'logp', only {', '.join(manifest.columns)}."
        raise InputError(Problem(where, message, "Score the data with --statistics logp."))
    return path


_T = TypeVar("_T", bound=BaseModel)


def nested(kind: type[_T], value: Any, info: ValidationInfo) -> _T:
    """A section inside another; an InputError names its fields from here on."""
    try:
        return kind.model_validate(value, context=info.context)
    except ValidationError as error:
        raise InputError(problems_of(error, kind, "")) from None


def problems_of(error: ValidationError, kind: Any, where: str) -> Iterator[Problem]:
    """Pydantic's findings as problems that name the field as the user wrote it, the value and the fix."""
    for item in error.errors():
        location = [part for part in item["loc"] if part != "[key]"]
        field = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
        owner = _owner(kind, location)
        name, value = str(location[-1]) if location else "", item["input"]
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            yield from (Problem(field + problem.field, problem.message, problem.fix) for problem in cause.problems)
        elif item["type"] == "extra_forbidden":
            yield Problem(field, f"there is no field {name!r}.", nearest(name, owner.model_fields))
        elif item["type"] == "missing":
            yield Problem(field, "is missing.", f"It is: {owner.model_fields[name].description}")
        elif item["type"] == "literal_error":
            choices = re.findall(r"'([^']*)'", item["ctx"]["expected"])
            yield Problem(field, f"{shorten(value)} is not known here.", nearest(str(value), choices))
        elif item["type"] in ("tuple_type", "list_type"):
            yield Problem(field, f"{shorten(value)} is not a list.", f"Write [{shorten(value)}], for example.")
        elif item["type"] in ("model_type", "dict_type"):
            keys = getattr(_owner(kind, [*location, ""]), "model_fields", {})
            yield Problem(field, f"{shorten(value)} is not a mapping.", f"Its keys: {', '.join(keys)}." if keys else "")
        elif item["type"] == "too_short":
            yield Problem(field, "is an empty list.")
        elif item["type"].startswith("int_"):
            yield Problem(field, f"{shorten(value)} is not a whole number.")
        elif item["type"].startswith("float_"):
            yield Problem(field, f"{shorten(value)} is not a number.")
        elif item["type"] == "string_type":
            yield Problem(field, f"{shorten(value)} is not text.", "Write it in quotes.")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            yield Problem(field, f"{shorten(value)} {message}.")


def _owner(kind: Any, location: list[int | str]) -> Any:
    """The section that the last part of `location` is a field of."""
    for part in location[:-1]:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            annotation = kind.model_fields[str(part)].annotation
            kind = next((choice for choice in get_args(annotation) if choice is not type(None)), annotation)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
    return kind


def shorten(value: Any) -> str:
    """A value as an error shows it: its start where it is long."""
    return reprlib.repr(value)
