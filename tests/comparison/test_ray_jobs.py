import importlib.util

import pytest
from small_jobs import SmallPlan, make_job, make_task

from tokenwise.comparison import ray_jobs
from tokenwise.comparison.runner import run_comparison
from tokenwise.errors import InputError


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_a_cluster_gives_the_results_of_local_runs(tmp_path):
    task = make_task(tmp_path)
    jobs = [
        make_job(task, kind="reference", label="clean"),
        make_job(task, {"excess_loss": {"reference": "clean"}}, reference="clean"),
        make_job(task, "own.py:Diverging", steps=9),
    ]
    remote = run_comparison(SmallPlan(*jobs), tmp_path / "remote", ray="local")
    local = run_comparison(SmallPlan(*jobs), tmp_path / "local")
    for here, there in zip(local, remote, strict=True):
        assert there.job == here.job
        assert (there.status, there.reason) == (here.status, here.reason)
        assert there.quality == here.quality
        assert there.costs.flops == here.costs.flops
        assert there.example == here.example
        assert there.versions == here.versions
        assert there.status == "failed" or not there.costs.seconds_comparable
    weights = [
        (tmp_path / name / remote[1].model_dir / "model.safetensors").read_bytes() for name in ("local", "remote")
    ]
    assert weights[0] == weights[1]
    assert remote[1].reference_costs.flops == remote[0].costs.flops
    assert (tmp_path / "remote" / "runs" / jobs[2].key / "log.txt").is_file()


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
