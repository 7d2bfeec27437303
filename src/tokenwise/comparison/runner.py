"""Runs the jobs of a comparison, each in a process of its own, and keeps what is finished."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tokenwise.comparison.formatting import duration
from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.run_folder import Executor, RunFolder
from tokenwise.errors import InputError, Problem


class Plan(Protocol):
    """What the runner needs of a plan."""

    def prepare(self, folder: Path, progress: Callable[[str], None]) -> object:
        """Make in `folder` what the jobs share, and say what is being made."""

    def jobs(self, folder: Path) -> list[Job]:
        """The jobs, references before the runs that wait for them; `prepare` has run."""
        ...


def run_comparison(
    plan: Plan, folder: Path | str, ray: str | None = None, console: Console | None = None
) -> list[Result]:
    """Run every job of `plan` that has no finished result in `folder` yet.

    References come first; a run whose reference failed is recorded as failed too. What failed before is tried again.
    Interrupting (Ctrl-C, or SIGTERM) ends the running process and leaves what is finished.

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
    with _ended_by_sigterm(), _locked(folder), _Display(console or Console()) as display:
        plan.prepare(folder, display.stage)
        folders = _run_folders(plan.jobs(folder), folder / "runs")
        display.expect(len(folders))
        with _executor(ray) as executor:
            for kind in ("reference", "run"):
                _run_missing([run for run in folders if run.job.kind == kind], executor, display)
    return [result for run in folders if (result := run.result()) is not None]


def _run_folders(jobs: list[Job], root: Path) -> list[RunFolder]:
    references = {job.label: RunFolder(job, root / job.key) for job in jobs if job.kind == "reference"}
    return [
        references[job.label]
        if job.kind == "reference"
        else RunFolder(job, root / job.key, references[job.reference] if job.reference else None)
        for job in jobs
    ]


def _run_missing(folders: list[RunFolder], executor: Executor, display: _Display) -> None:
    waiting: dict[Path, RunFolder] = {}  # the same job under two labels runs once
    for run in folders:
        reference = run.reference
        if run.finished() or run.path in waiting:
            display.reused()
        elif reference is not None and not reference.finished():
            failed = reference.result()
            run.fail(f"Its reference {reference.job.label!r} failed: {failed.reason if failed else 'no result'}")
            display.ended(run)
        else:
            waiting[run.path] = run
    for run, death in executor.run(list(waiting.values()), display.update):
        if death is None:
            run.complete(executor.concurrent)
        else:
            run.fail(death)
        display.ended(run)


def _executor(ray: str | None) -> Executor:
    if ray is not None:
        from tokenwise.comparison.ray_jobs import RayCluster

        return RayCluster(ray)
    from tokenwise.comparison.local_jobs import LocalProcesses

    return LocalProcesses()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave by an exception when the system asks this process to end, so that no job is left behind.

    A handler of the caller's own stays, and so does everything in other threads than the main one.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0
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
            refresh_per_second=2,  # drawing takes time from what is being timed
        )
        self._bar = self._live.add_task("runs", total=None, now="")

    def __enter__(self) -> _Display:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._live.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit) and self._total:
            self._print("Finished runs are kept; the same command continues.")

    def stage(self, what: str) -> None:
        """Show what is being prepared."""
        self._live.update(self._bar, now=what)
        if not self._console.is_terminal:
            self._print(f"{what} ...")

    def expect(self, total: int) -> None:
        """Say how many runs there are."""
        self._total = total
        self._live.update(self._bar, total=total, now="")

    def update(self, run: RunFolder, event: dict[str, Any]) -> None:
        """Show a progress event of a running job."""
        if event["event"] == "progress":
            loss = f", loss {event['loss']:.3f}" if "loss" in event else ""
            now = f"{run.name}: {event['share']:.0%}{loss}"
            self._live.update(self._bar, completed=self._done + event["share"], now=now)
        elif event["event"] == "silent":
            said = f"nothing heard for {duration(event['seconds'])}"
            if event["stopped"]:
                said += f": its process is stopped (kill -CONT {event['process']} lets it go on)"
            self._live.update(self._bar, now=f"{run.name}: {said}")
            if not self._console.is_terminal:
                self._print(f"{run.name}: {said}")
        else:
            self._live.update(self._bar, now=f"{run.name}: starting")

    def reused(self) -> None:
        """Count a result that was there already."""
        self._count()

    def ended(self, run: RunFolder) -> None:
        """Count a job that has just ended, and say how."""
        self._count()
        result = run.result()
        if result is not None and result.quality is not None:
            measured = f"{result.quality.value:.4f} {result.quality.measure.unit}"
            seconds = result.costs.wall_seconds or 0.0
            each = f" for each {result.quality.item}" if result.costs.dense_seconds is not None else ""
            outcome = f"{measured}, {f'{seconds:.1f} s' if not each else duration(seconds)}{each}"
        else:
            outcome = f"failed. {result.reason if result else ''}"
        if not self._console.is_terminal or (result is not None and result.status == "failed"):
            self._print(f"[{self._done}/{self._total}] {run.name}: {outcome}")

    def _print(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _count(self) -> None:
        self._done += 1
        self._live.update(self._bar, completed=self._done)
