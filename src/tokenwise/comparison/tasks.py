"""The tasks of a comparison: what a plan says under `task`, what is prepared from it, and where its runs are done.

A task is a section of the plan with a few answers about itself. Its runs import torch, so they live in a module of
their own, `Task.runs_in`, with a function ``run(job, folder, progress) -> Result``. A new task is a class in `TASKS`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator, ValidationInfo, model_validator

from tokenwise.comparison import data as blocks_of
from tokenwise.comparison.cache_tasks import LongContext
from tokenwise.comparison.chat import read_responses
from tokenwise.comparison.reduction_tasks import ImageClassification, VisualQuestionAnswering
from tokenwise.comparison.rows import Answers, Examples, Findings, Ragged, Responses
from tokenwise.comparison.sections import Files, Model, Section, Training, Whole, nested, shorten
from tokenwise.comparison.task import BaseTask
from tokenwise.documents import read_documents, read_records
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.files import write_binary
from tokenwise.method import Method
from tokenwise.models import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS_OF_METHODS = {
    "weights": "weights of tokens",
    "pointwise": "weights of tokens",
    "classes": "losses over the classes of examples",
    "objective": "a loss of its own",
    "masks": "masks of parameters",
}
"""What a weighting method gives, by its `kind`, in words."""


def check_held_out(train: tuple[Path, ...], held_out: tuple[Path, ...], where: str) -> None:
    """Refuse to train on the files that the result is measured on."""
    shared = sorted(set(train) & set(held_out))
    if shared:
        fix = "Held-out text must not be trained on."
        raise InputError(Problem(where, f"{str(path)!r} is also in task.data.eval.", fix) for path in shared)


@dataclass(frozen=True)
class Preparation:
    """What a task may know when it turns data into token ids.

    Args:
        tokenizer: makes them.
        training: how every method trains.
        reads: the columns of the data that some method reads.
    """

    tokenizer: PreTrainedTokenizerBase
    training: Training
    reads: frozenset[str]


class Data(Section):
    """Where the data is."""

    train: Files
    """Data to train on: a path, a list of paths or a glob."""
    eval: Files
    """Held-out data to measure on."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        check_held_out(self.train, self.eval, ".train")
        return self


class Task(BaseTask):
    """What is learnt, by which model, from what."""

    family: ClassVar[str] = "weighting"
    baseline: ClassVar[str] = "uniform"
    trains: ClassVar[frozenset[str]] = frozenset({"weights", "pointwise"})
    """The kinds of methods it compares; uniform fits every task."""
    columns: ClassVar[frozenset[str]] = frozenset({"sample_id"})
    """The columns of a batch that its data can have."""
    asks_for: ClassVar[frozenset[str]] = frozenset()
    """The columns that every method of it must read; uniform need not."""
    units: ClassVar[tuple[str, ...]] = ("tokens_seen", "tokens_trained", "steps", "flops")
    """What its budget can be counted in."""
    normalizes: ClassVar[bool] = True
    """Whether `training.normalize` means anything to its methods."""
    trains_references: ClassVar[bool] = True
    """Whether a plan's references can be trained on data of their own."""
    names: ClassVar[tuple[str, ...]] = ("train_rows", "held_out_rows")
    suffixes: ClassVar[tuple[str, str]] = ("train.npz", "held-out.npz")
    """How their names end."""

    model: Model
    """A directory, a hub id, or {config: {...}, tokenizer: ...} for a model made from scratch."""
    data: Data
    """{train: ..., eval: ...}."""

    def fits(self, length: int, name: str) -> Self:
        """Refuse rows that are longer than the model's positions reach."""
        limit = load.max_positions(self.model.config)
        if limit is not None and length > limit:
            message = f"{length} is more than the {limit} positions of the model."
            fix = f"Write at most {limit}" + (", or raise the config's limit." if self.model.from_scratch else ".")
            raise InputError(Problem(f".{name}", message, fix))
        return self

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """The settings that decide which text is read from the files."""

    def settings(self) -> dict[str, Any]:
        """All settings that decide a run's outcome, `reading` among them, as plain JSON values."""
        return self.reading()

    @abstractmethod
    def texts(self, files: tuple[Path, ...], where: str) -> Iterable[str]:
        """The text of the files, for a tokenizer to learn from."""

    @abstractmethod
    def prepare_train(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> None:
        """Turn data to train on into a file of token ids; one that is there is used again, and checked."""

    @abstractmethod
    def prepare_held_out(self, path: Path, given: Preparation) -> None:
        """Turn the held-out data into a file of token ids."""

    def rows(self, train: Path) -> Iterator[NDArray[np.int32]]:
        """The token ids of each row of a file that `prepare_train` wrote, as the runs train on them: [tokens]."""
        found = Ragged.load(train)
        return (found.input_ids[found.span(index)] for index in range(len(found)))

    def remark(self, train: Path, held_out: Path) -> str:
        """What a reader should know of the prepared data, in words."""
        rows = Ragged.remark_of(train), Ragged.remark_of(held_out)
        return f" ({rows[0]}; held out: {rows[1]})"

    def labels_of_a_step(self, training: Training) -> int | None:
        """How many labels an optimizer step has; None where steps differ."""
        return None

    @classmethod
    def check_method(cls, method: Method, where: str) -> None:
        from tokenwise.catalog import load_class

        if getattr(type(method), "family", None) != "weighting":
            raise InputError(Problem(where, f"{method.card.id!r} is no weighting method; this task compares these."))
        kind = getattr(type(method), "kind", "")
        name = cls.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
        reads: frozenset[str] = getattr(method, "reads", frozenset())
        fits = kind in cls.trains and cls.asks_for <= reads
        if not fits and not isinstance(method, load_class("weighting/uniform")):
            others = [
                other
                for other, task in TASKS.items()
                if issubclass(task, Task) and kind in task.trains and task.asks_for <= reads
            ]
            fix = f"Compare it in a task of kind {others[0]}." if others else "No task compares it yet."
            gives, wants = KINDS_OF_METHODS.get(kind, kind), KINDS_OF_METHODS[min(cls.trains)]
            wants += "".join(f" that reads the column {column}" for column in cls.asks_for)
            raise InputError(Problem(where, f"{method.card.id!r} gives {gives}; {name} compares {wants}.", fix))
        from tokenwise.weighting.base import TokenWeighter
        from tokenwise.weighting.forward import COLUMNS

        for column in sorted(reads & set(COLUMNS) - cls.columns - {"reference_nll"}):
            message = f"{method.card.id!r} needs a column {column}, which the data of {name} does not have."
            raise InputError(Problem(where, message))
        if "reference_nll" in reads and isinstance(method, TokenWeighter) and not method.has_reference():
            message = f"{method.card.id!r} reads a reference model, but its field reference names none."
            raise InputError(Problem(where, message))


class TextData(Data):
    """Where the text is."""

    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Name of the field or column that holds the text."""


class LanguageModeling(Task):
    """Every token of text is predicted from those before it."""

    runs_in: ClassVar[str] = "tokenwise.comparison.language_modeling"
    names: ClassVar[tuple[str, ...]] = ("train_blocks", "held_out_windows")
    suffixes: ClassVar[tuple[str, str]] = ("blocks.npy", "windows.npz")

    kind: Literal["language_modeling"]
    """The kind of task."""
    data: TextData
    """{train: ..., eval: ...}."""
    sequence_length: Annotated[Whole, Field(ge=2)] = 512
    """Tokens of a training sequence."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self.fits(self.sequence_length, "sequence_length")

    @property
    def described(self) -> str:
        return f"language modeling, sequences of {self.sequence_length} tokens"

    def reading(self) -> dict[str, Any]:
        return {"text_field": self.data.text_field}

    def settings(self) -> dict[str, Any]:
        return {**self.reading(), "sequence_length": self.sequence_length}

    def texts(self, files: tuple[Path, ...], where: str) -> Iterable[str]:
        return read_documents(files, self.data.text_field, where)

    def prepare_train(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> None:
        at_least = given.training.batch_size
        if not path.is_file() or len(np.load(path, mmap_mode="r")) < at_least:
            texts = self.texts(files, where)
            blocks = blocks_of.token_blocks(texts, given.tokenizer, self.sequence_length, at_least, where)
            write_binary(path, lambda stream: np.save(stream, blocks, allow_pickle=False))

    def prepare_held_out(self, path: Path, given: Preparation) -> None:
        if not path.is_file():
            texts = self.texts(self.data.eval, "task.data.eval")
            windows = blocks_of.held_out_windows(texts, given.tokenizer, self.sequence_length, "task.data.eval")
            write_binary(path, windows.save)

    def rows(self, train: Path) -> Iterator[NDArray[np.int32]]:
        return iter(np.load(train, mmap_mode="r"))

    def remark(self, train: Path, held_out: Path) -> str:
        return ""

    def labels_of_a_step(self, training: Training) -> int:
        return training.batch_size * training.accumulate * (self.sequence_length - 1)


class Sft(Task):
    """Responses are learnt, the prompts before them are read."""

    runs_in: ClassVar[str] = "tokenwise.comparison.sft"
    columns: ClassVar[frozenset[str]] = frozenset({"sample_id", "loss_weights"})

    kind: Literal["sft"]
    """The kind of task."""
    max_length: Annotated[Whole, Field(ge=2)] = 512
    """Tokens of a row, prompt and response; what is longer is cut."""
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 128
    """Tokens the model may write as its answer to a held-out prompt."""
    metric: Literal["loss", "exact_match"] = "loss"
    """What ranks: the loss of the held-out responses, or the share of answers that match exactly."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self.fits(self.max_length, "max_length")

    @property
    def described(self) -> str:
        return f"supervised fine-tuning, rows of at most {self.max_length} tokens"

    def reading(self) -> dict[str, Any]:
        return {"max_length": self.max_length}

    def settings(self) -> dict[str, Any]:
        return {**self.reading(), "max_new_tokens": self.max_new_tokens, "metric": self.metric}

    def texts(self, files: tuple[Path, ...], where: str) -> Iterator[str]:
        return _texts_of_records(files, where)

    def _rows(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> Responses:
        if not path.is_file():
            findings = Findings(where)
            rows = read_responses(read_records(files, where), given.tokenizer, self.max_length, findings)
            problems = findings.problems()
            if not len(rows) and not problems:
                message, fix = "there is no row.", "Give rows of messages, or of prompt and completion."
                if rows.left_out:
                    message = f"no row has a response within {self.max_length} tokens: all prompts are too long."
                    fix = "Raise max_length, or shorten the prompts."
                problems.append(Problem(where, message, fix))
            if problems:
                raise InputError(problems)
            write_binary(path, rows.save)
        return Responses.load(path)

    def prepare_train(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> None:
        rows = self._rows(path, files, where, given)
        if "loss_weights" in given.reads and not len(rows.loss_weights):
            message = "its rows have no weights, and a method reads the column loss_weights."
            raise InputError(Problem(where, message, "Give each row a number `weight`, or a list `loss_weights`."))

    def prepare_held_out(self, path: Path, given: Preparation) -> None:
        rows = self._rows(path, self.data.eval, "task.data.eval", given)
        limit = load.max_positions(self.model.config)
        longest = int(rows.prompts.max()) + self.max_new_tokens
        if limit is not None and longest > limit:
            message = (
                f"the longest prompt and {self.max_new_tokens} new tokens are {longest} tokens, and the model has "
            )
            raise InputError(Problem("task.max_new_tokens", f"{message}{limit} positions.", "Lower it, or max_length."))


def _texts_of_records(files: tuple[Path, ...], where: str) -> Iterator[str]:
    """All text in the fields and the messages of records."""
    for _, row in read_records(files, where):
        for value in row.values() if isinstance(row, Mapping) else ():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (
                    turn["content"]
                    for turn in value
                    if isinstance(turn, Mapping) and isinstance(turn.get("content"), str)
                )


class LabelledData(TextData):
    """Where the labelled texts are."""

    label_field: Annotated[str, Field(min_length=1)] = "label"
    """Name of the field or column that holds the class: text or a whole number."""


class Classification(Task):
    """Texts are put into classes."""

    runs_in: ClassVar[str] = "tokenwise.comparison.classification"
    head: ClassVar[load.Head] = "classification"
    trains: ClassVar[frozenset[str]] = frozenset({"classes"})
    units: ClassVar[tuple[str, ...]] = ("tokens_seen", "steps", "flops")
    normalizes: ClassVar[bool] = False

    kind: Literal["classification"]
    """The kind of task."""
    data: LabelledData
    """{train: ..., eval: ...}."""
    max_length: Annotated[Whole, Field(ge=2)] = 256
    """Tokens of a text; what is longer is cut."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return self.fits(self.max_length, "max_length")

    @property
    def described(self) -> str:
        return f"classification, texts of at most {self.max_length} tokens"

    def reading(self) -> dict[str, Any]:
        fields = {"text_field": self.data.text_field, "label_field": self.data.label_field}
        return {**fields, "max_length": self.max_length}

    def texts(self, files: tuple[Path, ...], where: str) -> Iterable[str]:
        return (text for _, text, _ in self._records(files, where, Findings(where)))

    def _records(self, files: tuple[Path, ...], where: str, findings: Findings) -> Iterator[tuple[str, str, str | int]]:
        """Where each record stands, its text and its label."""
        text_field, label_field = self.data.text_field, self.data.label_field
        for place, row in read_records(files, where):
            if not isinstance(row, Mapping):
                findings.add(place, f"holds {type(row).__name__}, not an object.")
                continue
            missing = [name for name in (text_field, label_field) if row.get(name) is None]
            for name in missing:
                findings.add(place, f"has no field {name!r}; it has {', '.join(row) or 'none'}.", nearest(name, row))
            if missing:
                continue
            text, label = row[text_field], row[label_field]
            if not isinstance(text, str) or not text.strip():
                findings.add(place, f"field {text_field!r} holds {'no text' if text == '' else shorten(text)}.")
            elif isinstance(label, bool) or not isinstance(label, str | int):
                findings.add(place, f"field {label_field!r} holds {shorten(label)}, neither text nor a whole number.")
            else:
                yield place, text, label

    def _classes(self, files: tuple[Path, ...], where: str) -> list[str | int]:
        labels = {label for _, _, label in self._records(files, where, Findings(where))}
        return sorted(labels, key=lambda label: (isinstance(label, str), label))

    def _write(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation, held_out: bool) -> None:
        if path.is_file():
            return
        classes = self._classes(self.data.train, "task.data.train")
        findings = Findings(where)
        records = list(self._records(files, where, findings))
        for place, _, label in records:
            if label not in classes:
                message = f"the label {label!r} does not occur in the training data."
                findings.add(place, message, nearest(str(label), map(str, classes), "Leave these rows out."))
        problems = findings.problems()
        counts = Counter(label for _, _, label in records)
        missing = [name for name in classes if not counts[name]]
        if not held_out and len(classes) < 2 and not problems:
            found = f"all rows have the label {classes[0]!r}" if classes else "there is no row"
            problems.append(Problem(where, f"{found}.", "There must be two classes or more."))
        elif held_out and missing:
            message = f"there is no example of {', '.join(map(repr, missing[:3]))}, so nothing could be said of it."
            problems.append(Problem(where, message, "Hold out some examples of every class."))
        if problems:
            raise InputError(problems)
        load.check_classes(self.model.config, len(classes), "task.model")
        texts = [text for _, text, _ in records]
        whole = given.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        encoded = given.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        ids = encoded["input_ids"]
        names = {name: index for index, name in enumerate(classes)}
        rows = Examples(
            np.array([token for row in ids for token in row], dtype=np.int32),
            np.cumsum([len(row) for row in ids]),
            np.array(sum(len(row) > len(short) for row, short in zip(whole, ids, strict=True))),
            np.array(0),
            np.array([names[label] for _, _, label in records]),
            np.array([str(name) for name in classes]),
        )
        write_binary(path, rows.save)

    def prepare_train(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> None:
        self._write(path, files, where, given, False)

    def prepare_held_out(self, path: Path, given: Preparation) -> None:
        self._write(path, self.data.eval, "task.data.eval", given, True)


class UnlearningData(Section):
    """Where the answers to forget and to keep are."""

    forget: Files
    """Data to forget; how far it is forgotten is measured on it as well."""
    retain: Files
    """Data to keep."""
    eval: Files = Field(default_factory=lambda found: found.get("retain", ()))
    """Data on which is measured what was kept: better not trained on; that of `retain` unless given."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        for name, files in (("retain", self.retain), ("eval", self.eval)):
            if shared := sorted(set(self.forget) & set(files)):
                message = f"{str(shared[0])!r} is also in task.data.{name}."
                raise InputError(Problem(".forget", message, "What is to be forgotten cannot be kept."))
        return self

    @property
    def train(self) -> tuple[Path, ...]:
        """All data to train on."""
        return (*self.forget, *self.retain)


class Unlearning(Task):
    """Some answers of a trained model are forgotten, the others kept."""

    runs_in: ClassVar[str] = "tokenwise.comparison.unlearning"
    trains: ClassVar[frozenset[str]] = frozenset({"objective"})
    columns: ClassVar[frozenset[str]] = frozenset({"forget"})
    asks_for: ClassVar[frozenset[str]] = frozenset({"forget"})
    units: ClassVar[tuple[str, ...]] = ("tokens_seen", "steps", "flops")
    normalizes: ClassVar[bool] = False
    trains_references: ClassVar[bool] = False

    kind: Literal["unlearning"]
    """The kind of task."""
    data: UnlearningData  # type: ignore[assignment]
    """{forget: ..., retain: ..., eval: ...}."""
    max_length: Annotated[Whole, Field(ge=2)] = 512
    """Tokens of a row, question and answer; what is longer is cut."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.from_scratch:
            message = "a model made from scratch knows nothing that it could forget."
            raise InputError(Problem(".model", message, "Name a model that was trained on forget and retain."))
        return self.fits(self.max_length, "max_length")

    @property
    def described(self) -> str:
        return f"unlearning, rows of at most {self.max_length} tokens"

    def reading(self) -> dict[str, Any]:
        # The files to forget and to keep follow one another; this says where the first of them end.
        return {"max_length": self.max_length, "forget_files": len(self.data.forget)}

    def texts(self, files: tuple[Path, ...], where: str) -> Iterator[str]:
        return _texts_of_records(files, where)

    def _write(self, path: Path, keep: tuple[Path, ...], where: str, given: Preparation) -> None:
        if path.is_file():
            return
        problems: list[Problem] = []
        read = {}
        for field, files in (("task.data.forget", self.data.forget), (where, keep)):
            findings = Findings(field)
            read[field] = _read_answers(read_records(files, field), given.tokenizer, self.max_length, findings)
            problems += findings.problems()
            if not read[field].ends and not findings.problems():
                message = f"no row has an answer within {self.max_length} tokens."
                problems.append(Problem(field, message, "Give rows of question and answer, or raise max_length."))
        if problems:
            raise InputError(problems)
        forget, retain = read.values()
        rows = Answers(
            np.array(forget.ids + retain.ids, dtype=np.int32),
            np.array(forget.ends + [len(forget.ids) + end for end in retain.ends], dtype=np.int64),
            np.array(forget.cut + retain.cut),
            np.array(forget.left_out + retain.left_out),
            np.array(forget.labels + retain.labels, dtype=np.int32),
            np.repeat([True, False], [len(forget.ends), len(retain.ends)]),
        )
        write_binary(path, rows.save)

    def prepare_train(self, path: Path, files: tuple[Path, ...], where: str, given: Preparation) -> None:
        self._write(path, self.data.retain, "task.data.retain", given)

    def prepare_held_out(self, path: Path, given: Preparation) -> None:
        self._write(path, self.data.eval, "task.data.eval", given)

    def remark(self, train: Path, held_out: Path) -> str:
        rows, measured = Answers.load(train), Answers.load(held_out)
        forget, retain, keep = len(rows.rows(True)), len(rows.rows(False)), len(measured.rows(False))
        kept = f"{keep:,} others to keep" if set(self.data.eval) != set(self.data.retain) else "those to keep"
        said = f" ({forget:,} rows to forget, {retain:,} to keep; measured on those to forget and {kept}"
        cut, left_out = int(rows.cut), int(rows.left_out)
        said += f"; {cut:,} cut" * bool(cut) + f"; {left_out:,} too long and left out" * bool(left_out)
        return f"{said})"


@dataclass
class _ReadAnswers:
    """Answers on their way to `Answers`, as lists of what it holds."""

    ids: list[int] = dataclass_field(default_factory=list)
    labels: list[int] = dataclass_field(default_factory=list)
    ends: list[int] = dataclass_field(default_factory=list)
    cut: int = 0
    left_out: int = 0


def _read_answers(
    records: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, findings: Findings
) -> _ReadAnswers:
    """Rows as `tokenwise unlearn` reads them; those that cannot be used are told to `findings`."""
    from tokenwise.weighting.unlearning_data import example

    found = _ReadAnswers()
    for where, record in records:
        try:
            row = example(record, tokenizer, field="")
        except InputError as error:
            for problem in error.problems:
                findings.add(where, f"{problem.field.removeprefix('.')} {problem.message}".strip(), problem.fix)
            continue
        ids, labels = row["input_ids"][:max_length], row["labels"][:max_length]
        if all(label == blocks_of.IGNORED for label in labels[1:]):
            found.left_out += 1
            continue
        found.cut += len(row["input_ids"]) > max_length
        found.ids += ids
        found.labels += labels
        found.ends.append(len(found.ids))
    return found


TASKS: dict[str, type[BaseTask]] = {
    "language_modeling": LanguageModeling,
    "sft": Sft,
    "classification": Classification,
    "unlearning": Unlearning,
    "image_classification": ImageClassification,
    "visual_question_answering": VisualQuestionAnswering,
    "long_context": LongContext,
}
"""Every kind of task; the one place that lists them."""


def task_class(raw: Any) -> type[BaseTask]:
    """The class of the task that a plan describes; the first where it does not say which."""
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    return TASKS.get(kind, LanguageModeling) if isinstance(kind, str) else LanguageModeling


def _read_task(value: Any, info: ValidationInfo) -> BaseTask:
    if not isinstance(value, Mapping):
        fix = "Its keys: kind, model, data."
        raise InputError(Problem("", f"{shorten(value)} is not a mapping.", fix))
    kind = task_class(value)
    problems = []
    if value.get("kind") is not None and value["kind"] not in TASKS:
        fix = nearest(str(value["kind"]), TASKS)
        problems.append(Problem(".kind", f"{shorten(value['kind'])} is not known here.", fix))
        value = {**value, "kind": "language_modeling"}
    assert info.context is not None
    info.context["head"] = kind.head
    try:
        task = nested(kind, value, info)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return task


AnyTask = Annotated[BaseTask, PlainValidator(_read_task)]
