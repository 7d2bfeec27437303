import importlib.util

import pytest
from small_jobs import SmallPlan, make_job, make_task

from tokenwise.comparison import ray_jobs
from tokenwise.comparison.runner import run_comparison
from tokenwise.errors import InputError
from tokenwise.models.load import load_tokenizer, make_or_load_model


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_the_results_of_local_runs(tmp_path):
    task = make_task(tmp_path)
    make_or_load_model(task["model"], 5, load_tokenizer(task["tokenizer"])).save_pretrained(tmp_path / "reference")
    with_reference = {**task, "reference": str(tmp_path / "reference")}
    job, dying = make_job(with_reference, "own.py:OwnExcessLoss"), make_job(task, "own.py:Dying")
    there, died = run_comparison(SmallPlan(job, dying), tmp_path / "remote", ray="local")
    [here] = run_comparison(SmallPlan(job), tmp_path / "local")
    assert there.job == here.job == job
    assert there.quality == here.quality
    assert there.costs.flops == here.costs.flops
    assert there.example == here.example
    assert there.versions == here.versions
    assert here.costs.seconds_comparable
    assert not there.costs.seconds_comparable
    local, remote = (
        (tmp_path / name / here.model_dir / "model.safetensors").read_bytes() for name in ("local", "remote")
    )
    assert local == remote
    assert died.reason == "The process was killed by signal 9 (SIGKILL); often: out of memory."
    assert (tmp_path / "remote" / "runs" / dying.key / "log.txt").is_file()


def test_without_ray_the_install_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tokenwise\[ray\]'"):
        ray_jobs.RayCluster("local")


def test_what_is_packed_is_unpacked_the_same(tmp_path):
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "file").write_bytes(b"\x00one")
    (tmp_path / "from" / "other").write_bytes(b"two")
    ray_jobs.unpack(ray_jobs.pack(tmp_path / "from"), tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "file").read_bytes() == b"\x00one"
    ray_jobs.unpack(ray_jobs.pack(tmp_path / "from", "other"), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["other"]
    ray_jobs.unpack(ray_jobs.pack(tmp_path / "from" / "other"), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"two"
