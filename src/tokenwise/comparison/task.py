"""What every task of a comparison is, whether its methods train or run a trained model more cheaply."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.sections import Section
from tokenwise.errors import InputError, Problem
from tokenwise.method import Method
from tokenwise.models import load


class BaseTask(Section, ABC):
    """What is done, by which model, with what."""

    runs_in: ClassVar[str]
    """The module whose `run` does a job of this task."""
    family: ClassVar[str]
    """The family of its methods."""
    baseline: ClassVar[str]
    """The method that others are measured against, unless the plan names another."""
    head: ClassVar[load.Head] = "causal"
    names: ClassVar[tuple[str, ...]]
    """How a job calls its prepared files."""

    kind: str
    """The kind of task."""

    @property
    @abstractmethod
    def described(self) -> str:
        """What is done, in words."""

    @classmethod
    @abstractmethod
    def check_method(cls, method: Method, where: str) -> None:
        """Refuse a method that is valid in itself, but nothing this task can run.

        Raises:
            InputError: saying why, and where it could be compared.
        """

    @classmethod
    def run(cls, job: Job, folder: Any, progress: Callable[[dict[str, Any]], None]) -> Result:
        """Do a job of this task."""
        result: Result = importlib.import_module(cls.runs_in).run(job, folder, progress)
        return result


class Amounts(Protocol):
    """How much every method may keep: the section `budget` of a plan that trains nothing."""

    @property
    def unit(self) -> str:
        """What an amount is of."""
        ...

    @property
    def amounts(self) -> tuple[float, ...]:
        """Those that each method is run at, falling."""
        ...

    def keep(self, amount: float) -> float | str:
        """What a method's `keep` is at an amount."""
        ...

    def named(self, amount: float) -> str:
        """An amount, in words."""
        ...

    def short(self, amount: float) -> str:
        """An amount, as it stands behind a method's name."""
        ...


class MeasuredTask(BaseTask):
    """A trained model is run more cheaply: nothing is trained, methods are measured at budgets."""

    names: ClassVar[tuple[str, ...]] = ("held_out_rows",)
    budgets: ClassVar[type[Section]]
    """What its plans have under `budget`: `Amounts`."""
    nothing_saved: ClassVar[str]
    """The id of the method that has no budget."""

    model: Any
    """The model."""
    data: Any
    """The data."""

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which each method is run at each budget; one where there is nothing to tell apart."""
        return ("",)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All settings that decide a run's outcome, as plain JSON values."""

    def sources(self) -> list[Path]:
        """The files and folders whose content decides a result, the model's apart."""
        return list(self.data.eval)

    @abstractmethod
    def prepare(self, path: Path) -> None:
        """Read the data into one file; one that is there is used again."""

    def check_prepared(self, path: Path, methods: Mapping[str, Method]) -> None:
        """Refuse methods, by label, that the prepared data does not fit.

        Raises:
            InputError: with all of them.
        """

    @abstractmethod
    def remark(self, path: Path) -> str:
        """What a reader should know of the prepared data, in words."""

    @abstractmethod
    def unfit(self, methods: Sequence[tuple[str, str, Method, float | None]]) -> list[Problem]:
        """Methods that the model cannot run, or to which the budget means nothing.

        Args:
            methods: of each its label, its name without the budget, itself, and its budget.
        """


def told(label: str, error: InputError) -> list[Problem]:
    """What is wrong with a method, as problems of the plan's list."""
    return [Problem(f"methods ({label})", f"{part.field}: {part.message}", part.fix) for part in error.problems]
