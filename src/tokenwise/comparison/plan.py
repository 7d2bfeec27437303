"""The plan of a comparison: read whole, checked whole, and turned into jobs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from tokenwise import catalog, fingerprint
from tokenwise.comparison.entries import Entry, Listed, make_entries, read_methods, reference_of
from tokenwise.comparison.records import Job
from tokenwise.comparison.sections import (
    MISSING,
    UNITS,
    Budget,
    NewTokenizer,
    Reference,
    Training,
    collect,
    existing_reference,
    existing_scores,
    problems_of,
    shorten,
)
from tokenwise.comparison.sections import SECTIONS as OTHER_SECTIONS
from tokenwise.comparison.stored import charged, check_fits, check_method, check_rows
from tokenwise.comparison.task import MeasuredTask
from tokenwise.comparison.tasks import AnyTask, Preparation, Task, check_held_out, task_class
from tokenwise.comparison.yaml_file import read_yaml
from tokenwise.errors import InputError, Problem, nearest
from tokenwise.models import load
from tokenwise.scores.layout import Manifest, is_store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenwise.comparison.measured_plan import MeasuredPlan

SECTIONS: dict[str, Any] = {"task": AnyTask, **OTHER_SECTIONS}
"""What stands under each key of a plan."""
LEARNING_RATE_FROM_SCRATCH = 1e-3
LEARNING_RATE_EXISTING = 5e-5
"""The default for a model that has been trained before: large steps would undo what it knows."""


@dataclass
class Plan:
    """A checked plan: every path exists, every method is built, every name is known.

    Call `prepare` once, then `jobs`.
    """

    file: Path
    task: Task
    training: Training
    budget: Budget
    seeds: tuple[int, ...]
    references: dict[str, Reference]
    entries: list[Entry]
    _remark: str = ""
    _fingerprints: dict[Any, str] = field(default_factory=dict, repr=False)

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return next(entry.label for entry in self.entries if entry.role == "baseline")

    def prepare(self, folder: Path, progress: Callable[[str], None] = lambda stage: None) -> None:
        """Do once what all runs need: train the tokenizer, and turn all text into token ids.

        What an earlier call left in `folder` is used again while its inputs are unchanged.

        Args:
            folder: the comparison's folder.
            progress: called with a few words before each slow stage.

        Raises:
            InputError: with everything wrong with the data: unreadable, empty or unfit; or a reference with
                another vocabulary than a tokenizer that was still to be trained.
        """
        folder.mkdir(parents=True, exist_ok=True)
        problems: list[Problem] = []
        self._train_tokenizer(folder, progress)
        tokenizer = self.tokenizer(folder)
        reads = frozenset(name for entry in self.entries for name in getattr(entry.method, "reads", ()))
        given = Preparation(tokenizer, self.training, reads)
        for where, files in self._training_data().items():
            path = self._train_file(folder, files)
            if not path.is_file():
                progress(f"reading {names_of(files)}")
            with collect(problems):
                self.task.prepare_train(path, files, where, given)
        path = self._held_out_file(folder)
        if not path.is_file():
            progress(f"reading {names_of(self.task.data.eval)}")
        with collect(problems):
            self.task.prepare_held_out(path, given)
        if isinstance(self.task.model.tokenizer, NewTokenizer):
            for name, reference in self.references.items():
                if reference.model is not None:
                    with collect(problems):
                        load.check_same_vocabulary(tokenizer, reference.model, f"reference {name}")
                if reference.scores is not None:
                    with collect(problems):
                        check_fits(reference.scores, tokenizer, None, f"reference {name}")
        if not problems:
            for name, reference in self.references.items():
                if reference.scores is not None:
                    progress(f"looking for the training data in the scores {name}")
                    with collect(problems):
                        check_rows(reference.scores, self.training_rows(folder), f"reference {name}", self.file)
        if problems:
            raise InputError(problems)
        self._remark = self.task.remark(self._train_file(folder, self.task.data.train), self._held_out_file(folder))

    def training_rows(self, folder: Path) -> Iterator[NDArray[np.int32]]:
        """The token ids of each row that the runs train on, after `prepare`: [tokens]."""
        return self.task.rows(self._train_file(folder, self.task.data.train))

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """What made them, after `prepare`."""
        return load.load_tokenizer(self._tokenizer_directory(folder), "task.model.tokenizer")

    def jobs(self, folder: Path) -> list[Job]:
        """All jobs: references first, then for each seed every method, so that a partial comparison is paired.

        Args:
            folder: the comparison's folder, after `prepare`.
        """
        references = {
            name: self._reference_job(folder, name, reference.train_on, reference.budget or self.budget)
            for name, reference in self.references.items()
            if reference.train_on is not None
        }
        runs = [self._run_job(folder, entry, seed, references) for seed in self.seeds for entry in self.entries]
        return [*references.values(), *runs]

    def summary(self) -> dict[str, str]:
        """What is compared, in words: task, model, data, budget, seeds, baseline, plan_file."""
        model = self.task.model
        described = model.written
        if model.from_scratch:
            described += f", {_rounded(load.count_parameters(model.config, self.task.head))} parameters"
        if isinstance(model.tokenizer, NewTokenizer):
            described += f", byte-level BPE of {model.tokenizer.vocab_size:,} tokens learnt from the training data"
        train, held_out = (names_of(paths) for paths in (self.task.data.train, self.task.data.eval))
        return {
            "task": self.task.described,
            "model": described,
            "data": f"trained on {train}, measured on {held_out}{self._remark}",
            "budget": f"{self.budget} in each run",
            "seeds": ", ".join(map(str, self.seeds)),
            "baseline": self.baseline,
            "plan_file": str(self.file),
        }

    def _reference_job(self, folder: Path, name: str, files: tuple[Path, ...], budget: Budget) -> Job:
        uniform = catalog.build("uniform")
        return Job(
            kind="reference",
            label=name,
            seed=self.seeds[0],
            method=uniform.spec(),
            role="candidate",
            task=self._job_task(folder, files),
            budget=budget.plain(),
            inputs={**self._job_inputs(folder, files), "method": f"version {uniform.version}"},
        )

    def _run_job(self, folder: Path, entry: Entry, seed: int, references: dict[str, Job]) -> Job:
        task = self._job_task(folder, self.task.data.train)
        inputs = self._job_inputs(folder, self.task.data.train)
        inputs["method"] = f"version {entry.method.version}"
        if entry.source is not None:
            task["method_folder"] = str(entry.source.parent)
            inputs["method"] += f" {self._fingerprint(fingerprint.of_file, entry.source)}"
        trained = references.get(entry.reference) if entry.reference is not None else None
        scores = self.references[entry.reference].scores if entry.reference is not None else None
        if trained is not None:
            inputs["reference"] = trained.key
        elif scores is not None:
            task["reference"] = str(scores)
            inputs["reference"] = fingerprint.of_value(Manifest.read(scores, "reference").deciding())
        elif entry.reference is not None:
            directory = self.references[entry.reference].model
            assert directory is not None
            task["reference"] = str(directory)
            inputs["reference"] = self._fingerprint(fingerprint.of_model, directory)
        return Job(
            kind="run",
            label=entry.label,
            seed=seed,
            method=entry.spec(),
            role=entry.role,
            task=task,
            budget=self.budget.plain(),
            reference=entry.reference if trained is not None else None,
            inputs=inputs,
            control=entry.control,
            reference_costs=charged(scores) if scores is not None else None,
        )

    def _job_task(self, folder: Path, files: tuple[Path, ...]) -> dict[str, Any]:
        train, held_out = self.task.names
        return {
            "kind": self.task.kind,
            "model": self.task.model.spec,
            "tokenizer": str(self._tokenizer_directory(folder)),
            "train": [str(path) for path in files],
            train: str(self._train_file(folder, files)),
            "eval": [str(path) for path in self.task.data.eval],
            held_out: str(self._held_out_file(folder)),
            **self.task.settings(),
            "training": self.training.model_dump(mode="json"),
        }

    def _job_inputs(self, folder: Path, files: tuple[Path, ...]) -> dict[str, str]:
        spec = self.task.model.spec
        if isinstance(spec, dict):
            model = fingerprint.of_value(spec)
        else:
            model = self._fingerprint(fingerprint.of_model, Path(spec))
        return {
            "model": model,
            "tokenizer": self._fingerprint(fingerprint.of_tokenizer, self._tokenizer_directory(folder)),
            "train": self._fingerprint(fingerprint.of_data, files),
            "eval": self._fingerprint(fingerprint.of_data, self.task.data.eval),
            **fingerprint.versions(),
        }

    def _training_data(self) -> dict[str, tuple[Path, ...]]:
        """All sets of files that a run or a reference trains on, by the plan's field."""
        found = {"task.data.train": self.task.data.train}
        for name, reference in self.references.items():
            if reference.train_on is not None:
                found[f"references.{name}.train_on"] = reference.train_on
        return found

    def _fingerprint(self, function: Callable[..., str], *arguments: Any) -> str:
        # Large files are hashed once, not once for each job.
        if (function, arguments) not in self._fingerprints:
            self._fingerprints[function, arguments] = function(*arguments)
        return self._fingerprints[function, arguments]

    def _tokenizer_directory(self, folder: Path) -> Path:
        wanted = self.task.model.tokenizer
        if isinstance(wanted, Path):
            return wanted
        values = [
            self._fingerprint(fingerprint.of_data, self.task.data.train),
            *self.task.reading().values(),
            wanted.model_dump(),
        ]
        return folder.resolve() / "tokenizer" / fingerprint.of_value([*values, fingerprint.versions()])[:20]

    def _prepared_file(self, folder: Path, files: tuple[Path, ...], name: str) -> Path:
        tokenizer = self._fingerprint(fingerprint.of_tokenizer, self._tokenizer_directory(folder))
        values = [
            self._fingerprint(fingerprint.of_data, files),
            tokenizer,
            *self._preparing(),
        ]
        return folder.resolve() / "tokens" / f"{fingerprint.of_value([*values, fingerprint.versions()])[:20]}-{name}"

    def _preparing(self) -> list[Any]:
        """What decides how data is turned into token ids, beside the data and the tokenizer."""
        if self.task.kind == "language_modeling":
            return list(self.task.settings().values())
        # The classes are those of the training data.
        return [self.task.kind, self.task.reading(), self._fingerprint(fingerprint.of_data, self.task.data.train)]

    def _train_file(self, folder: Path, files: tuple[Path, ...]) -> Path:
        return self._prepared_file(folder, files, self.task.suffixes[0])

    def _held_out_file(self, folder: Path) -> Path:
        return self._prepared_file(folder, self.task.data.eval, self.task.suffixes[1])

    def _train_tokenizer(self, folder: Path, progress: Callable[[str], None]) -> None:
        wanted, directory = self.task.model.tokenizer, self._tokenizer_directory(folder)
        if isinstance(wanted, Path) or directory.is_dir():
            return
        progress("training the tokenizer")
        documents = self.task.texts(self.task.data.train, "task.data.train")
        tokenizer = load.train_tokenizer(documents, wanted.vocab_size)
        directory.parent.mkdir(exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix="."))
        try:
            tokenizer.save_pretrained(temporary)
            temporary.rename(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read_plan(path: Path | str) -> Plan | MeasuredPlan:
    """Read and check a plan. Paths in it start at its folder.

    Raises:
        InputError: with every problem of the plan at once, before anything is run.
    """
    path = Path(path)
    raw = _read_mapping(path)
    kind = task_class(raw.get("task"))
    if issubclass(kind, MeasuredTask):
        from tokenwise.comparison.measured_plan import read_measured_plan

        return read_measured_plan(path, raw)
    folder = path.resolve().parent
    problems = [
        Problem(str(name), "is no part of a plan.", nearest(str(name), SECTIONS))
        for name in raw
        if name not in SECTIONS
    ]
    values = read_sections(raw, SECTIONS, folder, problems)
    listed = read_methods(values.get("methods"), folder, problems, kind)
    references = _read_references(listed, raw, values.get("references", {}), folder, problems)
    task, budget, training = values.get("task"), values.get("budget"), values.get("training", Training())
    if task is not None:
        for name, reference in references.items():
            with collect(problems):
                check_held_out(reference.train_on or (), task.data.eval, f"references.{name}.train_on")
            if reference.train_on is not None and not task.trains_references:
                message = f"{task.kind} trains no references."
                problems.append(Problem(f"references.{name}.train_on", message, "Write model: and a directory."))
        problems += _budget_problems(task, training, budget, references)
        if isinstance(task.model.tokenizer, Path):
            tokenizer = load.load_tokenizer(task.model.tokenizer)
            for name, reference in references.items():
                if reference.model is not None:
                    with collect(problems):
                        load.check_same_vocabulary(tokenizer, reference.model, f"reference {name}")
                if reference.scores is not None:
                    size = task.model.config.get_text_config().vocab_size
                    with collect(problems):
                        check_fits(reference.scores, tokenizer, size, f"reference {name}")
    for entry in listed:
        named = references.get(str(reference_of(entry)))
        if entry.method is not None and named is not None and named.scores is not None:
            with collect(problems):
                check_method(entry.method, named.scores, f"{entry.where}.{next(iter(entry.spec))}.reference")
    entries = make_entries(listed, values.get("baseline", kind.baseline), problems, kind)
    if problems or task is None or budget is None:
        raise InputError(problems)
    if training.learning_rate is None:
        default = LEARNING_RATE_FROM_SCRATCH if task.model.from_scratch else LEARNING_RATE_EXISTING
        training = training.model_copy(update={"learning_rate": default})
    return Plan(path, task, training, budget, values.get("seeds", (0, 1, 2)), references, entries)


def read_training_data(path: Path | str) -> Plan:
    """Read what a plan says of its task and training alone: enough for `Plan.prepare` and `Plan.training_rows`.

    The other sections are not looked at, so that a reference they name need not exist yet.

    Raises:
        InputError: with every problem of these two sections.
    """
    path = Path(path)
    problems: list[Problem] = []
    sections = {name: SECTIONS[name] for name in ("task", "training")}
    values = read_sections(_read_mapping(path), sections, path.resolve().parent, problems)
    if "task" in values and not isinstance(values["task"], Task):
        problems.append(Problem("task.kind", f"{values['task'].kind} trains nothing.", "There is no data to score."))
    if problems:
        raise InputError(problems)
    return Plan(path, values["task"], values.get("training", Training()), Budget(unit="steps", amount=1), (), {}, [])


def _read_mapping(path: Path) -> Mapping[Any, Any]:
    raw = read_yaml(path)
    if not isinstance(raw, Mapping):
        what = "is empty" if raw is None else f"holds {shorten(raw)}, not a mapping"
        raise InputError(Problem(path.name, f"{what}.", f"A plan has the keys {', '.join(SECTIONS)}."))
    return raw


def read_sections(
    raw: Mapping[Any, Any],
    sections: Mapping[str, Any],
    folder: Path,
    problems: list[Problem],
    missing: Mapping[str, str] = MISSING,
) -> dict[str, Any]:
    """The sections that are there and right; what is wrong with the others is added to `problems`.

    Args:
        raw: the plan as it is written.
        sections: what stands under each key.
        folder: where relative paths start.
        problems: of the plan.
        missing: the keys that must be there, and what to write.
    """
    values: dict[str, Any] = {}
    for name, kind in sections.items():
        if raw.get(name) is None:
            if name in missing:
                problems.append(Problem(name, "is missing.", missing[name]))
            continue
        try:
            values[name] = TypeAdapter(kind).validate_python(raw[name], context={"folder": folder})
        except ValidationError as error:
            problems += problems_of(error, kind, name)
    return values


def _read_references(
    listed: list[Listed], raw: Mapping[str, Any], defined: dict[str, Reference], folder: Path, problems: list[Problem]
) -> dict[str, Reference]:
    """The references that methods use: those the plan defines, and the directories that methods name themselves."""
    names = {str(name) for name in raw["references"]} if isinstance(raw.get("references"), Mapping) else set()
    references = dict(defined)
    used = set()
    misspelt = False
    for entry in listed:
        name = reference_of(entry)
        if not isinstance(name, str):
            continue
        used.add(name)
        if name in names or name in references:
            continue
        where = f"{entry.where}.{next(iter(entry.spec))}.reference"
        if "/" not in name and not (folder / name).exists():
            fix = nearest(name, names, "Define it under references, or write a directory.")
            problems.append(Problem(where, f"there is no reference {name!r}.", fix))
            misspelt = True
            continue
        with collect(problems):
            if is_store(folder / Path(name).expanduser()):
                references[name] = Reference.model_construct(scores=existing_scores(name, folder, where))
            else:
                references[name] = Reference.model_construct(model=existing_reference(name, folder, where))
    unused = [] if misspelt else sorted(names - used)
    problems += [Problem(f"references.{name}", "is used by no method.", "Remove it.") for name in unused]
    return references


def _budget_problems(
    task: Task, training: Training, budget: Budget | None, references: dict[str, Reference]
) -> Iterator[Problem]:
    if training.normalize != "none" and not task.normalizes:
        message = f"{training.normalize!r} means nothing to {task.kind}, whose methods give no weights to tokens."
        yield Problem("training.normalize", message, "Leave it out.")
    step = task.labels_of_a_step(training)
    budgets = {"budget": budget} | {f"references.{name}.budget": entry.budget for name, entry in references.items()}
    for where, entry in budgets.items():
        if entry is None:
            continue
        if entry.unit not in task.units:
            message = f"{task.kind} does not count {UNITS[entry.unit]}."
            yield Problem(f"{where}.unit", message, f"Write one of {', '.join(task.units)}.")
        elif step is not None and entry.unit in ("tokens_seen", "tokens_trained") and entry.amount < step:
            message = f"{int(entry.amount):,} {UNITS[entry.unit]} are less than one step, which takes {step:,}."
            yield Problem(f"{where}.amount", message, "Raise it, or lower batch_size or sequence_length.")


def names_of(paths: tuple[Path, ...]) -> str:
    """The names of the first files, and how many more there are."""
    shown = ", ".join(path.name for path in paths[:3])
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _rounded(count: int) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return str(count)
