"""Runs the jobs of a comparison, each in a process of its own, and keeps what is finished."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.worker import write_job
from tokenwise.errors import InputError, Problem


class Plan(Protocol):
    """What the runner needs of a plan."""

    def prepare(self, folder: Path) -> object:
        """Make in `folder` what the jobs share."""

    def jobs(self) -> list[Job]:
        """The jobs, once `prepare` has run."""
        ...


@dataclass(frozen=True)
class Task:
    """A job, the folder of its result (``<comparison>/runs/<key>``), and the reference it waits for."""

    job: Job
    folder: Path
    reference: Task | None = None

    @property
    def name(self) -> str:
        """What a user calls it."""
        kind = "reference " if self.job.kind == "reference" else ""
        return f"{kind}{self.job.label}, seed {self.job.seed}"

    @property
    def job_file(self) -> Path:
        return self.folder / "job.json"

    def result(self) -> Result | None:
        """The stored result under this comparison's names; None where there is none that can be read."""
        try:
            result = Result.read(self.folder / "result.json")
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or its format is of another version
            return None
        result.job = self.job
        return result

    def finished(self) -> bool:
        """Whether a finished result is there; for a reference also the model, which others wait for."""
        result = self.result()
        done = result is not None and result.status == "finished"
        return done and (self.job.kind == "run" or (self.folder / "model").is_dir())

    def begin(self) -> None:
        """Clear what an earlier try left and write the job file, the reference's name replaced by its model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        job = self.job
        if self.reference is not None:
            [(name, fields)] = job.method.items()
            job = replace(job, method={name: {**fields, "reference": str(self.reference.folder / "model")}})
        write_job(job, self.job_file)

    def fail(self, reason: str) -> None:
        """Record that the job failed."""
        Result(job=self.job, status="failed", reason=reason).write(self.folder / "result.json")

    def complete(self, concurrent: bool) -> None:
        """Add to the stored result what its own process did not know."""
        result = self.result()
        if result is None:
            self.fail("The process ended well but left no result.")
            return
        result.costs.seconds_comparable = not concurrent
        charged = self.reference.result() if self.reference is not None else None
        result.reference_costs = charged.costs if charged is not None else None
        result.write(self.folder / "result.json")


OnEvent = Callable[[Task, dict[str, Any]], None]


class Executor(AbstractContextManager["Executor"], Protocol):
    """Where jobs run."""

    concurrent: bool
    """Whether several jobs may run at once, so that their wall times cannot be compared."""

    def run(self, tasks: list[Task], on_event: OnEvent) -> Iterator[tuple[Task, str | None]]:
        """Yield each task when it has ended, with the reason if its process died without a result."""
        ...


def run_comparison(
    plan: Plan, folder: Path | str, ray: str | None = None, console: Console | None = None
) -> list[Result]:
    """Run every job of `plan` that has no finished result in `folder` yet.

    References come first; a run whose reference failed is recorded as failed too. What failed before is tried again.
    Interrupting (Ctrl-C) ends the running process and leaves what is finished.

    Args:
        plan: what `read_plan` gives; its `prepare` is called here, under the lock.
        folder: made if missing. Each job's result is ``runs/<key>/result.json``, its model and log beside it.
        ray: address of a Ray cluster, ``local`` to start one on this machine; None for one local process at a time.
        console: for the live progress; standard output unless given.

    Returns:
        Results in the order of the plan's jobs, of references and runs, finished and failed.

    Raises:
        InputError: when another comparison is at work in the folder, or Ray is asked for and not installed.
    """
    folder = Path(folder).absolute()
    with _locked(folder):
        plan.prepare(folder)
        tasks = _tasks(plan.jobs(), folder)
        with _Display(console or Console(), len(tasks)) as display, _executor(ray) as executor:
            for kind in ("reference", "run"):
                _run_missing([task for task in tasks if task.job.kind == kind], executor, display)
    return [result for task in tasks if (result := task.result()) is not None]


def _tasks(jobs: list[Job], folder: Path) -> list[Task]:
    runs = folder / "runs"
    references = {
        (job.label, job.seed): Task(job, runs / job.key) for job in jobs if job.kind == "reference"
    }  # fmt: skip
    by_label = {label: task for (label, _), task in references.items()}

    def task_of(job: Job) -> Task:
        if job.kind == "reference":
            return references[job.label, job.seed]
        if job.reference is None:
            return Task(job, runs / job.key)
        # A reference trained with the run's own seed, where there is one for every seed.
        reference = references.get((job.reference, job.seed)) or by_label[job.reference]
        both = f"{job.key} {reference.folder.name}"
        return Task(job, runs / hashlib.sha256(both.encode()).hexdigest()[:20], reference)

    return [task_of(job) for job in jobs]


def _run_missing(tasks: list[Task], executor: Executor, display: _Display) -> None:
    waiting: dict[Path, Task] = {}  # two labels of the same job share a folder, and run once
    for task in tasks:
        if task.finished():
            display.reused()
        elif task.reference is not None and not task.reference.finished():
            failed = task.reference.result()
            task.fail(f"Its reference {task.job.reference!r} failed: {failed.reason if failed else 'no result'}")
            display.ended(task)
        elif task.folder in waiting:
            display.reused()
        else:
            task.begin()
            waiting[task.folder] = task
    for task, death in executor.run(list(waiting.values()), display.update):
        if death is None:
            task.complete(executor.concurrent)
        else:
            task.fail(death)
        display.ended(task)


def _executor(ray: str | None) -> Executor:
    if ray is not None:
        from tokenwise.comparison.ray_jobs import RayCluster

        return RayCluster(ray)
    from tokenwise.comparison.local_jobs import LocalProcesses

    return LocalProcesses()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other comparisons out of the folder. The system drops the lock of a process that dies."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            Problem(str(folder), "another comparison is at work in this folder.", "Wait for it, or use another folder.")
        ) from None
    try:
        yield
    finally:
        lock.release()


class _Display(AbstractContextManager["_Display"]):
    """Runs done, the current one with its loss, and the time left; on anything but a terminal a line per run."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=600,
        )
        self._bar = self._live.add_task("runs", total=total, now="")

    def __enter__(self) -> _Display:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, task: Task, event: dict[str, Any]) -> None:
        """Show a progress event of a running task."""
        if event["event"] == "progress":
            now = f"{task.name}: {event['share']:.0%}, loss {event['loss']:.3f}"
            self._live.update(self._bar, completed=self._done + event["share"], now=now)

    def reused(self) -> None:
        """Count a result that was there already."""
        self._count()

    def ended(self, task: Task) -> None:
        """Count a task that has just ended, and say how."""
        self._count()
        result = task.result()
        if result is not None and result.quality is not None:
            outcome = f"{result.quality.nats_per_token:.4f} nats/token, {result.costs.wall_seconds:.1f} s"
        else:
            outcome = f"failed. {result.reason if result else ''}"
        if not self._console.is_terminal or (result is not None and result.status == "failed"):
            line = f"[{self._done}/{self._total}] {task.name}: {outcome}"
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _count(self) -> None:
        self._done += 1
        self._live.update(self._bar, completed=self._done)
