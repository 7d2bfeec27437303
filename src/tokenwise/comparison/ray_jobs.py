"""Jobs as tasks on a Ray cluster, several at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenwise.cluster import connect, require_ray, worker_resources
from tokenwise.comparison.local_jobs import cause_of_death
from tokenwise.comparison.records import Job
from tokenwise.comparison.run_folder import Executor, OnEvent, RunFolder
from tokenwise.comparison.tasks import TASKS
from tokenwise.files import write_text

Files = dict[str, bytes]
"""A file or folder as it travels: content by relative path; a single file has the path ``""``."""


class RayCluster(Executor):
    """Sends each job, and the files it reads, to the cluster and brings back what it wrote.

    A job runs in a process of its own there too, with the number of threads it would have had here (fewer where no
    node has as many), so that its result is the same. The nodes need tokenwise, but no shared file system.

    Args:
        address: as `ray.init` takes it; ``local`` starts a cluster on this machine. A connection that this process
            has already is used whatever the address.

    Raises:
        InputError: when Ray is not installed, or there is no cluster at the address.
    """

    concurrent = True

    def __init__(self, address: str) -> None:
        require_ray()
        self._address = address
        self._connected_here = False
        self._sent: dict[tuple[Path, str | None], Any] = {}
        self._pending: dict[Any, RunFolder] = {}

    def __enter__(self) -> RayCluster:
        self._connected_here = connect(self._address)
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        for running in self._pending:
            ray.cancel(running, force=True)
        if self._connected_here:
            ray.shutdown()

    def run(self, folders: list[RunFolder], on_event: OnEvent) -> Iterator[tuple[RunFolder, str | None]]:
        import ray

        threads, gpus = worker_resources()
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(run_there)
        for folder in folders:
            job = folder.begin()
            inputs = {name: self._send(*place) for name, place in _inputs(job).items()}
            self._pending[remote.remote(asdict(job), folder.path.name, inputs, threads)] = folder
        while self._pending:
            [ended], _ = ray.wait(list(self._pending))
            folder = self._pending.pop(ended)
            try:
                returncode, files = ray.get(ended)
            except ray.exceptions.RayError as error:
                yield folder, f"Ray lost the job: {' '.join(str(error).split())}"
                continue
            result = files.pop("result.json", None)
            unpack(files, folder.path)
            if result is None:
                yield folder, cause_of_death(returncode)
                continue
            write_text(folder.path / "result.json", result.decode())
            yield folder, None

    def _send(self, path: Path, only: str | None = None) -> Any:
        import ray

        if (path, only) not in self._sent:
            self._sent[path, only] = ray.put(pack(path, only))
        return self._sent[path, only]


def _inputs(job: Job) -> dict[str, tuple[Path] | tuple[Path, str]]:
    """What a job reads, as arguments of `pack`, by the field of its task that says where it lies."""
    names = ["tokenizer", *TASKS[job.task["kind"]].names, "reference"]
    if isinstance(job.task["model"], str):
        names.append("model")
    inputs: dict[str, tuple[Path] | tuple[Path, str]] = {
        name: (Path(job.task[name]),) for name in names if name in job.task
    }
    [method] = job.method
    if ".py:" in method:
        inputs["method_folder"] = (Path(job.task["method_folder"]), method.rpartition(":")[0])
    return inputs


def run_there(job: dict[str, Any], key: str, inputs: dict[str, Any], threads: int) -> tuple[int, Files]:
    """Run a job on a node; returns the exit code of its process and the files it wrote.

    Args:
        job: the job's fields.
        key: name of its folder.
        inputs: what it reads, as references to `Files`, by field of its task.
        threads: of the process.
    """
    import ray

    with tempfile.TemporaryDirectory(prefix="tokenwise-") as root:
        task = dict(job["task"])
        for name, files in zip(inputs, ray.get(list(inputs.values())), strict=True):
            place = Path(root, "inputs", name)
            unpack(files, place)
            task[name] = str(place)
        folder = Path(root, "runs", key)
        moved = replace(Job(**job), task=task)
        write_text(folder / "job.json", json.dumps(asdict(moved), ensure_ascii=False))
        process = subprocess.run(
            [sys.executable, "-P", "-m", "tokenwise.comparison.worker", str(folder / "job.json")],
            stdout=subprocess.PIPE,  # closed when this task is cancelled, and that ends the process
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        written = pack(folder)
    del written["job.json"]
    return process.returncode, written


def pack(path: Path, only: str | None = None) -> Files:
    """Read a file, or a folder with everything in it (or one file `only`); links are followed."""
    if path.is_file():
        return {"": path.read_bytes()}
    if only is not None:
        return {only: (path / only).read_bytes()}
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def unpack(files: Files, path: Path) -> None:
    """Write what `pack` read."""
    for name, content in files.items():
        target = path / name if name else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
