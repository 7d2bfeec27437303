"""What every task of a comparison is, whether its methods train or run a trained model more cheaply."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.sections import Section
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
