"""A process of its own for every job.

``python -m tokenwise.comparison.worker JOB_FILE`` runs one job: progress events leave on stdout, one JSON object per
line; ``result.json`` and ``log.txt`` appear beside the job file.

``python -m tokenwise.comparison.worker --serve`` reads paths of job files from stdin and runs each in a new process,
one after the other; after each it prints ``{"event": "end", "returncode": ...}``. Where processes can fork, the
libraries are imported once for all of them: that import takes longer than many a small run. When its stdin is closed
while a job runs, whoever started it is gone, however that came: it ends at once, and the job with it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tokenwise.comparison.records import Job, Result
from tokenwise.comparison.tasks import TASKS
from tokenwise.errors import InputError

_LOOK_EVERY = 100
"""Milliseconds between two looks at a job where the system does not report its end."""


def run_job(path: Path, out: int) -> Result:
    """Run the job of a file and write its result beside it, whatever happens on the way.

    Args:
        path: the job file, ``<comparison>/runs/<key>/job.json``.
        out: file descriptor for the progress events.
    """
    job = Job(**json.loads(path.read_text(encoding="utf-8")))

    def progress(event: dict[str, Any]) -> None:
        try:
            os.write(out, (json.dumps(event) + "\n").encode())
        except BrokenPipeError:
            # Whoever started this process is gone, and its successor may soon run the same job.
            print("The comparison has ended; so does this run.", file=sys.stderr, flush=True)
            os._exit(1)

    progress({"event": "start", "process": os.getpid()})
    try:
        result = TASKS[job.task["kind"]].run(job, path.parent, progress)
        model = path.parent / "model"
        result.model_dir = model.relative_to(path.parent.parent.parent).as_posix() if model.is_dir() else None
    except Exception as error:
        traceback.print_exc()
        result = Result(job=job, status="failed", reason=reason_of(error))
    result.write(path.with_name("result.json"))
    return result


def reason_of(error: Exception) -> str:
    """Why a run failed, in one sentence."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"Out of memory: {text or 'no more could be allocated'}"
    if type(error).__name__ == "RunFailed" or isinstance(error, InputError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the CPU (where torch has no exception of its own for it) or on a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def main(arguments: list[str]) -> int:
    """Run one job, or serve many; see the module."""
    # One run, one device; and no helper threads, which would not survive a fork.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if arguments == ["--serve"]:
        return _serve()
    path = Path(arguments[0]).absolute()
    out = os.dup(sys.stdout.fileno())
    _print_into(path.with_name("log.txt"))
    return 0 if run_job(path, out).status == "finished" else 1


def _print_into(log: Path) -> None:
    """Send everything that anything in this process prints from now on to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _serve() -> int:
    # Ctrl-C in a terminal reaches every process; what is to end then is decided by the one that started this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forks = _can_fork()
    if forks:
        for task in TASKS.values():
            importlib.import_module(task.runs_in)
    for line in sys.stdin:
        path = line.rstrip("\n")
        code = _fork(path) if forks else _spawn(path)
        print(json.dumps({"event": "end", "returncode": code}), flush=True)
    return 0


def _can_fork() -> bool:
    # Elsewhere than on Linux system libraries break in forked processes, and CUDA does once it was looked for.
    if not sys.platform.startswith("linux"):
        return False
    import torch

    return not torch.cuda.is_available()


def _fork(path: str) -> int:
    """Run a job in a copy of this process. Returns its exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(0)
            code = main([path])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return _wait(process)


def _spawn(path: str) -> int:
    """Run a job in a new process. Returns its exit code, negative for a signal."""
    process = subprocess.Popen([sys.executable, "-P", "-m", __spec__.name, path], stdin=subprocess.DEVNULL)
    return process.wait() if sys.platform == "win32" else _wait(process.pid)


def _wait(process: int) -> int:
    """Wait for a job, but no longer than someone holds the other end of stdin."""
    watched = select.poll()
    watched.register(0, 0)  # nothing but the other end's closing
    ended = os.pidfd_open(process) if hasattr(os, "pidfd_open") else None
    if ended is not None:
        watched.register(ended, select.POLLIN)
    try:
        while True:
            for handle, _ in watched.poll(None if ended is not None else _LOOK_EVERY):
                if handle == 0:
                    os.killpg(0, signal.SIGKILL)  # the server's session: the job, what it started, and this process
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
    finally:
        if ended is not None:
            os.close(ended)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
