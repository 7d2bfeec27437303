"""Jobs as processes on this machine, one at a time."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tokenwise.comparison.run_folder import Executor, OnEvent, RunFolder

_PATIENCE = 5.0
SILENCE = 300.0
"""Seconds without a word from a job after which it is said; then after twice as long, and so on."""


class LocalProcesses(Executor):
    """Starts each job in a new process; the libraries are loaded once, by a server that starts with the first job."""

    concurrent = False

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        if kind is not None:
            _end(server, kindly=True)
        assert server.stdin is not None
        server.stdin.close()  # at which it ends
        try:
            server.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            _end(server, kindly=False)
            server.wait()

    def run(self, folders: list[RunFolder], on_event: OnEvent) -> Iterator[tuple[RunFolder, str | None]]:
        for folder in folders:
            yield folder, self._run(folder, on_event)

    def _run(self, folder: RunFolder, on_event: OnEvent) -> str | None:
        folder.begin()
        if self._server is None or self._server.poll() is not None:
            self._server = _start(folder)
            self._lines = _read_lines(self._server.stdout)
        assert self._server.stdin is not None
        self._server.stdin.write(f"{folder.job_file}\n")
        self._server.stdin.flush()
        process: int | None = None
        while (line := self._next_line(folder, on_event, process)) is not None:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "end":
                return None if (folder.path / "result.json").exists() else cause_of_death(event["returncode"])
            process = event.get("process", process)
            on_event(folder, event)
        server, self._server = self._server, None
        return cause_of_death(server.wait())

    def _next_line(self, folder: RunFolder, on_event: OnEvent, process: int | None) -> str | None:
        """What the server says next, None at its end. Silence is told, and never ends a job: it may just be slow."""
        since, patience = time.monotonic(), SILENCE
        while True:
            try:
                return self._lines.get(timeout=patience)
            except queue.Empty:
                silent = time.monotonic() - since
                stopped = process is not None and is_stopped(process)
                on_event(folder, {"event": "silent", "seconds": silent, "process": process, "stopped": stopped})
                patience = silent


def cause_of_death(returncode: int) -> str:
    """Why a process ended without leaving a result; a negative code is a signal's number."""
    if returncode >= 0:
        return f"The process ended with exit code {returncode} and without a result; log.txt says more."
    number = -returncode
    often = "; often: out of memory" if number == 9 else ""
    return f"The process was killed by signal {number} ({signal.Signals(number).name}){often}."


def is_stopped(process: int) -> bool:
    """Whether a process is stopped (as by Ctrl-Z), so that it does nothing until it is told to go on.

    False where the system has no such list of processes as Linux.
    """
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")


def _read_lines(stream: IO[str] | None) -> queue.SimpleQueue[str | None]:
    """The lines of a stream as they come, None at its end."""
    assert stream is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _start(folder: RunFolder) -> subprocess.Popen[str]:
    with (folder.path / "log.txt").open("w") as log:
        return subprocess.Popen(
            # -P: a file called datasets.py in the current folder must not shadow the library.
            [sys.executable, "-P", "-m", "tokenwise.comparison.worker", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Threads that wait sleep instead of spinning: on a busy machine spinning makes small models crawl.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            start_new_session=True,  # Ctrl-C ends the comparison, and that ends the server and its job
        )


def _end(server: subprocess.Popen[str], kindly: bool) -> None:
    """End the server and the job it runs."""
    if sys.platform == "win32":
        server.terminate()
    else:
        os.killpg(server.pid, signal.SIGTERM if kindly else signal.SIGKILL)
        os.killpg(server.pid, signal.SIGCONT)  # a stopped process would end no sooner
