"""Jobs as processes on this machine, one at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tokenwise.comparison.run_folder import Executor, OnEvent, RunFolder

_PATIENCE = 5.0


class LocalProcesses(Executor):
    """Starts each job in a new process; the libraries are loaded once, by a server that starts with the first job."""

    concurrent = False

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        if kind is not None:
            _end(server, kindly=True)
        try:
            server.communicate(timeout=_PATIENCE)  # closes its stdin, at which it ends
        except subprocess.TimeoutExpired:
            _end(server, kindly=False)
            server.communicate()

    def run(self, folders: list[RunFolder], on_event: OnEvent) -> Iterator[tuple[RunFolder, str | None]]:
        for folder in folders:
            yield folder, self._run(folder, on_event)

    def _run(self, folder: RunFolder, on_event: OnEvent) -> str | None:
        folder.begin()
        if self._server is None or self._server.poll() is not None:
            self._server = _start(folder)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{folder.job_file}\n")
        self._server.stdin.flush()
        for line in self._server.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "end":
                return None if (folder.path / "result.json").exists() else cause_of_death(event["returncode"])
            on_event(folder, event)
        server, self._server = self._server, None
        return cause_of_death(server.wait())


def cause_of_death(returncode: int) -> str:
    """Why a process ended without leaving a result; a negative code is a signal's number."""
    if returncode >= 0:
        return f"The process ended with exit code {returncode} and without a result; log.txt says more."
    number = -returncode
    often = "; often: out of memory" if number == 9 else ""
    return f"The process was killed by signal {number} ({signal.Signals(number).name}){often}."


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
