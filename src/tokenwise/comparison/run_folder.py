"""A comparison's folder on disk: one folder for each job, and where jobs run."""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenwise.comparison.records import Costs, Job, Result
from tokenwise.files import write_text


@dataclass(frozen=True)
class RunFolder:
    """A job, the folder of its result (``<comparison>/runs/<key>``), and that of the reference it waits for."""

    job: Job
    path: Path
    reference: RunFolder | None = None

    @property
    def name(self) -> str:
        """What a user calls it."""
        kind = "reference " if self.job.kind == "reference" else ""
        return f"{kind}{self.job.label}, seed {self.job.seed}"

    @property
    def job_file(self) -> Path:
        return self.path / "job.json"

    def result(self) -> Result | None:
        """The stored result under this comparison's names; None where there is none that can be read."""
        try:
            result = Result.read(self.path / "result.json")
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or its format is of another version
            return None
        result.job = self.job
        if self.job.reference_costs is not None:
            result.reference_costs = Costs(**self.job.reference_costs)
        return result

    def finished(self) -> bool:
        """Whether a finished result is there; for a reference also the model, which others wait for."""
        result = self.result()
        done = result is not None and result.status == "finished"
        return done and (self.job.kind == "run" or (self.path / "model").is_dir())

    def begin(self) -> Job:
        """Clear what an earlier try left, write the job file and return its job, which says where the reference is."""
        shutil.rmtree(self.path, ignore_errors=True)
        job = self.job
        if self.reference is not None:
            job = replace(job, task={**job.task, "reference": str(self.reference.path / "model")})
        write_text(self.job_file, json.dumps(asdict(job), indent=1, ensure_ascii=False) + "\n")
        return job

    def fail(self, reason: str) -> None:
        """Record that the job failed."""
        Result(job=self.job, status="failed", reason=reason).write(self.path / "result.json")

    def complete(self, concurrent: bool) -> None:
        """Add to the stored result what its own process did not know."""
        result = self.result()
        if result is None:
            self.fail("The process ended well but left no result.")
            return
        result.costs.seconds_comparable = not concurrent
        charged = self.reference.result() if self.reference is not None else None
        if charged is not None:
            result.reference_costs = charged.costs
        result.write(self.path / "result.json")


OnEvent = Callable[[RunFolder, dict[str, Any]], None]


class Executor(AbstractContextManager["Executor"]):
    """Where jobs run."""

    concurrent: bool
    """Whether several jobs may run at once, so that their wall times cannot be compared."""

    @abstractmethod
    def run(self, folders: list[RunFolder], on_event: OnEvent) -> Iterator[tuple[RunFolder, str | None]]:
        """Yield each folder when its job has ended, with the reason if its process died without a result."""
