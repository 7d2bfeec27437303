import io
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
from filelock import FileLock
from rich.console import Console
from small_jobs import SmallPlan, make_job, make_task

from tokenwise.comparison import local_jobs, runner
from tokenwise.comparison.records import Job
from tokenwise.comparison.run_folder import RunFolder
from tokenwise.comparison.runner import run_comparison
from tokenwise.errors import InputError

EXCESS = {"excess_loss": {"reference": "clean"}}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def compare(jobs, folder):
    """Run a comparison of some jobs; returns its results and the lines it printed."""
    printed = io.StringIO()
    results = run_comparison(SmallPlan(*jobs), folder, console=Console(file=printed, width=200))
    first, *lines = printed.getvalue().splitlines()
    assert first == "preparing nothing ..."
    return results, lines


class Story:
    """One comparison: interrupted at the start of a run, then resumed to the end."""

    def __init__(self, task, folder):
        self.folder = folder
        self.jobs = [
            make_job(task, kind="reference", label="clean"),
            make_job(task, "own.py:Diverging", kind="reference", label="broken", steps=9),
            make_job(task),
            make_job(task, label="victim", seed=2),
            make_job(task, "own.py:Dying", steps=9),
            make_job(task, "own.py:Greedy", steps=9),
            make_job(task, EXCESS, reference="clean"),
            make_job(task, EXCESS, reference="broken", label="excess, broken"),
            make_job(task, label="uniform again"),
        ]
        self.interrupted_process = None
        self._interrupt()
        self.stamps = self._stamps()
        self.results, self.lines = compare(self.jobs, folder)
        self.by_label = {result.job.label: result for result in self.results}
        self.stamps_after = self._stamps()

    def _interrupt(self):
        update = runner._Display.update

        def interrupt(display, run, event):
            update(display, run, event)
            if run.job.label == "victim" and event["event"] == "start":
                self.interrupted_process = event["process"]
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner._Display, "update", interrupt)
            with pytest.raises(KeyboardInterrupt):
                compare(self.jobs, self.folder)

    def _stamps(self):
        return {path.parent.name: path.stat().st_mtime_ns for path in self.folder.glob("runs/*/result.json")}


@pytest.fixture(scope="module")
def story(task, tmp_path_factory):
    return Story(task, tmp_path_factory.mktemp("comparison"))


def test_an_interruption_ends_the_running_process_and_keeps_what_is_finished(story):
    process = story.interrupted_process
    assert not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    clean, broken, uniform, victim = (job.key for job in story.jobs[:4])
    assert {clean, broken, uniform} < set(story.stamps)
    assert victim not in story.stamps
    assert story.stamps_after[clean] == story.stamps[clean]
    assert story.stamps_after[uniform] == story.stamps[uniform]
    assert story.stamps_after[broken] > story.stamps[broken]  # what failed is tried again


def test_whatever_happens_to_a_run_is_recorded_and_the_others_go_on(story):
    assert [result.job for result in story.results] == story.jobs
    finished = {label for label, result in story.by_label.items() if result.status == "finished"}
    assert finished == {"clean", "uniform", "victim", "excess_loss", "uniform again"}
    reasons = {label: result.reason for label, result in story.by_label.items()}
    assert reasons["Dying"] == "The process was killed by signal 9 (SIGKILL); often: out of memory."
    assert reasons["broken"] == "The training loss became nan at step 3: the training diverged."
    assert reasons["Greedy"].startswith("Out of memory: ")
    assert reasons["excess, broken"] == f"Its reference 'broken' failed: {reasons['broken']}"
    assert "RunFailed" in (story.folder / "runs" / story.jobs[1].key / "log.txt").read_text()
    assert f"Dying, seed 1: failed. {reasons['Dying']}" in "\n".join(story.lines)
    assert len(story.lines) == len(story.jobs) - 3  # two were finished, one is the same job under another label


def test_a_reference_is_charged_to_the_runs_that_use_it(story):
    results = story.by_label
    assert results["excess_loss"].reference_costs == results["clean"].costs
    assert results["uniform"].reference_costs is None
    assert results["excess_loss"].weights["kept_share"] < 1
    assert results["uniform again"].quality == results["uniform"].quality
    assert all(result.costs.seconds_comparable for result in story.results)


def test_models_are_kept_and_the_stored_result_names_no_place_on_this_machine(story):
    for label in ("clean", "uniform", "excess_loss"):
        assert (story.folder / story.by_label[label].model_dir / "model.safetensors").is_file()
    stored = story.folder / "runs" / story.by_label["excess_loss"].job.key
    assert str(story.folder) in (stored / "job.json").read_text()
    assert str(story.folder) not in (stored / "result.json").read_text()


def test_a_repeated_comparison_starts_no_process(story, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(local_jobs.subprocess, "Popen", refuse)
    finished = [result for result in story.results if result.status == "finished"]
    results, lines = compare([result.job for result in finished], story.folder)
    assert results == finished
    assert lines == []
    with pytest.raises(AssertionError, match="a process was started"):
        compare(story.jobs, story.folder)


def test_on_a_terminal_the_current_run_its_loss_and_failures_are_shown(tmp_path):
    printed = io.StringIO()
    job = Job("run", "excess_loss", 4, {}, "candidate", {}, {})
    run = RunFolder(job, tmp_path / job.key)
    run.fail("It died.")
    with runner._Display(Console(file=printed, force_terminal=True, width=160)) as display:
        display.stage("training the tokenizer")
        display._live.refresh()
        display.expect(9)
        display.update(run, {"event": "start", "process": 1})
        display._live.refresh()
        display.update(run, {"event": "progress", "share": 0.25, "loss": 3.21, "seconds": 1.0})
        display._live.refresh()
        display.ended(run)
    shown = printed.getvalue()
    for part in (
        "training the tokenizer",
        "excess_loss, seed 4: starting",
        "excess_loss, seed 4: 25%, loss 3.210",
        "0/9",
        "[1/9] excess_loss, seed 4: failed. It died.",
    ):
        assert part in shown


def test_a_second_comparison_in_the_same_folder_is_refused_and_a_dead_ones_lock_is_taken(tmp_path):
    folder = tmp_path / "comparison"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(InputError, match="another comparison is at work"):
        compare([], folder)
    code = f"import os, filelock; filelock.FileLock({str(folder / '.lock')!r}).acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert compare([], folder) == ([], [])


def test_a_result_of_another_format_is_computed_again_and_labels_are_the_plans(task, tmp_path):
    job = make_job(task)
    folder = RunFolder(job, tmp_path / job.key)
    assert folder.result() is None
    folder.fail("no reason")
    renamed = RunFolder(replace(job, label="another"), folder.path)
    assert renamed.result().job.label == "another"
    (folder.path / "result.json").write_text('{"status": "finished"}')
    assert folder.result() is None
    assert not folder.finished()


@pytest.mark.parametrize(
    ("returncode", "reason"),
    [
        (-signal.SIGKILL, "killed by signal 9 (SIGKILL); often: out of memory"),
        (-signal.SIGSEGV, "killed by signal 11 (SIGSEGV)"),
        (3, "exit code 3 and without a result"),
    ],
)
def test_a_death_is_told_in_words(returncode, reason):
    assert reason in local_jobs.cause_of_death(returncode)
