"""The plan of a comparison that trains nothing: every method at every budget, on the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenwise import fingerprint
from tokenwise.comparison.entries import Entry, Listed, make_entries, read_methods
from tokenwise.comparison.plan import names_of, read_sections
from tokenwise.comparison.records import Job
from tokenwise.comparison.sections import Seeds, collect
from tokenwise.comparison.task import Amounts, MeasuredTask
from tokenwise.comparison.tasks import AnyTask, task_class
from tokenwise.errors import InputError, Problem, nearest

SECTIONS: dict[str, Any] = {"task": AnyTask, "seeds": Seeds, "methods": list[Any], "baseline": str}
"""What stands under each key of such a plan; the task knows what its budgets are."""
SEEDS = (0, 1, 2, 3, 4)
"""Runs are short, and only those that draw are repeated."""
MISSING = {
    "task": "Write what to do: {kind: image_classification, model: ..., data: {eval: ...}}.",
    "budget": "Write what every method may keep, such as {unit: keep, amounts: [0.75, 0.5, 0.25]}.",
    "methods": "Write the methods to compare, such as [tome, evit].",
}


@dataclass
class MeasuredPlan:
    """A checked plan: every path exists, every method is built and fits the model.

    Call `prepare` once, then `jobs`.
    """

    file: Path
    task: MeasuredTask
    budget: Amounts
    seeds: tuple[int, ...]
    entries: list[Entry]
    _remark: str = ""
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return next(entry.label for entry in self.entries if entry.role == "baseline")

    def prepare(self, folder: Path, progress: Callable[[str], None] = lambda stage: None) -> None:
        """Read the data once for all runs; what an earlier call left in `folder` is used again.

        Raises:
            InputError: with everything wrong with the data.
        """
        path = self._data_file(folder)
        if not path.is_file():
            progress(f"reading {names_of(self.task.data.eval)}")
            self.task.prepare(path)
        self.task.check_prepared(path, {entry.label: entry.method for entry in self.entries})
        self._remark = self.task.remark(path)

    def jobs(self, folder: Path) -> list[Job]:
        """All jobs, for each seed every method. A method that draws nothing has one run, which stands for all seeds."""
        return [self._job(folder, entry, seed) for seed in self.seeds for entry in self.entries]

    def summary(self) -> dict[str, str]:
        """What is compared, in words: family, task, model, data, budget, seeds, baseline, plan_file."""
        return {
            "family": self.task.family,
            "task": self.task.described,
            "model": f"{self.task.model.written}, {self.task.model.config.model_type}",
            "data": f"measured on {names_of(self.task.data.eval)}{self._remark}",
            "budget": str(self.budget),
            "seeds": ", ".join(map(str, self.seeds)),
            "baseline": self.baseline,
            "plan_file": str(self.file),
        }

    def _job(self, folder: Path, entry: Entry, seed: int) -> Job:
        method = entry.method
        draws = "seed" in type(method).model_fields
        method = method.replace(seed=seed) if draws else method
        task = {
            "kind": self.task.kind,
            "model": str(self.task.model.directory),
            "eval": [str(path) for path in self.task.data.eval],
            "held_out_rows": str(self._data_file(folder)),
            **self.task.settings(),
        }
        inputs = {**self._inputs(), "method": f"version {method.version}"}
        if entry.source is not None:
            task["method_folder"] = str(entry.source.parent)
            inputs["method"] += f" {fingerprint.of_file(entry.source)}"
        return Job(
            kind="run",
            label=entry.label,
            seed=seed,
            method=replace(entry, method=method).spec(),
            role=entry.role,
            task=task,
            budget={
                "unit": self.budget.unit,
                "share": entry.share if entry.share is not None else 1.0,
                **({"way": entry.way} if entry.way else {}),
            },
            inputs=inputs,
            control=entry.control,
            series=entry.series,
            draws=draws,
        )

    def _inputs(self) -> dict[str, str]:
        if not self._fingerprints:  # large files are hashed once, not once for each job
            self._fingerprints = {
                "model": fingerprint.of_model(self.task.model.directory),
                "eval": fingerprint.of_data(self.task.sources()),
                **fingerprint.versions(),
            }
        return self._fingerprints

    def _data_file(self, folder: Path) -> Path:
        inputs = self._inputs()
        # The model decides what its classes are called.
        name = fingerprint.of_value([inputs["eval"], inputs["model"], self.task.settings(), fingerprint.versions()])
        return folder.resolve() / "data" / f"{name[:20]}.npz"


def read_measured_plan(path: Path, raw: Mapping[Any, Any]) -> MeasuredPlan:
    """Check a plan that `read_plan` has read.

    Raises:
        InputError: with every problem of the plan at once, before anything is run.
    """
    folder = path.resolve().parent
    kind = task_class(raw.get("task"))
    assert issubclass(kind, MeasuredTask)
    name = raw["task"]["kind"]
    sections = {**SECTIONS, "budget": kind.budgets}
    problems = [
        Problem(str(key), f"is no part of a plan of {name}.", nearest(str(key), sections, "Leave it out."))
        for key in raw
        if key not in sections
    ]
    values = read_sections(raw, sections, folder, problems, MISSING)
    listed = read_methods(values.get("methods"), folder, problems, kind)
    task, budget = values.get("task"), values.get("budget")
    entries: list[Entry] = []
    if budget is not None:
        ways = task.ways if task is not None else ("",)
        for entry in listed:
            if entry.method is not None:
                problems += _set_by_the_plan(entry)
        spread = [part for entry in listed for part in _at_budgets(entry, budget, ways, kind, problems)]
        entries = make_entries(spread, values.get("baseline", kind.baseline), problems, kind)
    if task is not None and budget is not None and not problems:
        with collect(problems):
            problems += task.unfit([(entry.label, entry.series, entry.method, entry.share) for entry in entries])
    if problems or task is None or budget is None:
        raise InputError(problems)
    return MeasuredPlan(path, task, budget, values.get("seeds", SEEDS), entries)


def _set_by_the_plan(entry: Listed) -> list[Problem]:
    """Fields that a method may not have of its own here."""
    where = f"{entry.where}.{entry.written}"
    why = {"keep": "Leave it out: budget.amounts says what stays.", "seed": "Leave it out: seeds says it."}
    given = entry.method.model_fields_set if entry.method is not None else set()
    return [Problem(f"{where}.{name}", "is set by the plan.", fix) for name, fix in why.items() if name in given]


def _at_budgets(
    entry: Listed, budget: Amounts, ways: tuple[str, ...], kind: type[MeasuredTask], problems: list[Problem]
) -> list[Listed]:
    """The method at every budget, in every way; the one that saves nothing as it is."""
    method = entry.method
    if method is None or method.card.id == kind.nothing_saved:
        return [entry]
    found = []
    with collect(problems):
        for share in budget.amounts:
            try:
                changed = type(method)(**{**method.config(), "keep": budget.keep(share)})
            except InputError as error:
                message = f"cannot be given {budget.named(share)}: {error.problems[0].message}"
                raise InputError(Problem(entry.where, f"{entry.written} {message}")) from None
            for way in ways:
                shown, apart = budget.short(share), way if len(ways) > 1 else ""
                label = None if entry.label is None else f"{entry.label} {shown} {apart}".rstrip()
                series = None if entry.label is None else f"{entry.label} {apart}".rstrip()
                found.append(
                    replace(entry, label=label, method=changed, share=share, shown=shown, way=way, series=series)
                )
    return found
