"""What becomes of the processes of a comparison when it is ended, killed or held."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest
from rich.console import Console
from small_jobs import make_job, make_task

from tokenwise.comparison import local_jobs, runner
from tokenwise.comparison.run_folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

PATIENCE = 60
COMPARISON = """
import json, signal, sys
from pathlib import Path
from tokenwise.comparison import runner
from tokenwise.comparison.records import Job

class Given:
    def prepare(self, folder, progress): pass
    def jobs(self, folder): return [Job(**job) for job in json.loads(Path(sys.argv[1]).read_text())]

update = runner._Display.update
def told(display, run, event):
    update(display, run, event)
    if run.job.label == "victim" and event["event"] == "start":
        print("victim", event["process"], flush=True)
runner._Display.update = told
# A shell that runs the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
runner.run_comparison(Given(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    found = make_task(folder)
    with (folder / "own.py").open("a") as stream:
        stream.write(
            "\nimport time\n\nclass Sleeping(TokenWeighter):\n"
            '    """Never comes to its end, and says nothing."""\n'
            "    def weights(self, batch, state):\n        time.sleep(600)\n"
        )
    return found


@pytest.fixture
def comparison(task, tmp_path):
    """A comparison in a process of its own, in the middle of a run that would last for ever."""
    jobs = [make_job(task), make_job(task, "own.py:Sleeping", label="victim")]
    (tmp_path / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    process = subprocess.Popen(
        [sys.executable, "-c", COMPARISON, str(tmp_path / "jobs.json"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    for line in process.stdout:
        if said := re.match(r"victim (\d+)", line):
            break
    assert said, process.stderr.read()
    job = psutil.Process(int(said[1]))
    server = psutil.Process(process.pid).children()[0]
    yield process, [job, server], tmp_path / "out"
    for left in (process, job, server):
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.communicate()


def gone(processes):
    """Whether they end, sooner or later."""
    until = time.monotonic() + PATIENCE
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("number", "code", "held"),
    [(signal.SIGTERM, 143, True), (signal.SIGINT, None, False), (signal.SIGKILL, -signal.SIGKILL, True)],
)
def test_no_process_outlives_its_comparison(comparison, number, code, held):
    process, workers, folder = comparison
    if held:
        workers[0].suspend()
    os.kill(process.pid, number)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code if code is not None else process.returncode != 0, errors
    assert gone(workers)
    [result] = folder.glob("runs/*/result.json")
    assert '"status": "finished"' in result.read_text()
    if number != signal.SIGKILL:
        assert "Finished runs are kept; the same command continues." in rest


def test_a_long_silence_is_told_and_ends_nothing(task, tmp_path, monkeypatch):
    """Told once by a job that sleeps, once more when it is stopped; then it is ended by hand."""
    monkeypatch.setattr(local_jobs, "SILENCE", 0.2)
    job = make_job(task, "own.py:Sleeping", label="victim")
    printed, events = io.StringIO(), []
    with runner._Display(Console(file=printed, width=200)) as display, local_jobs.LocalProcesses() as executor:

        def hear(run, event):
            events.append(event)
            display.update(run, event)
            if event["event"] == "silent" and event["process"] is not None:
                process = psutil.Process(event["process"])
                process.kill() if event["stopped"] else process.suspend()

        [(_, death)] = executor.run([RunFolder(job, tmp_path / job.key)], hear)
    assert death == "The process was killed by signal 9 (SIGKILL); often: out of memory."
    silent = [event for event in events if event["event"] == "silent"]
    assert not silent[0]["stopped"]
    shown = printed.getvalue()
    assert re.search(r"victim, seed 1: nothing heard for \d+ ms", shown)
    assert re.search(r"its process is stopped \(kill -CONT \d+ lets it go on\)", shown)


def test_a_terminated_caller_keeps_its_own_handler():
    own = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with runner._ended_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(SystemExit, match="143"), runner._ended_by_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, own)
