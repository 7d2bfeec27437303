"""`training.normalize: mean` reaches the loss, and a normalised run is another run."""

import pytest
from small_jobs import make_job, make_task

from tokenwise.comparison.language_modeling import run
from tokenwise.comparison.sections import Training
from tokenwise.weighting import apply


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def test_a_normalized_run_takes_steps_of_full_size(task, tmp_path, monkeypatch):
    handles = []
    plain = apply._weigh_model
    monkeypatch.setattr(
        apply, "_weigh_model", lambda *given, **named: handles.append(plain(*given, **named)) or handles[-1]
    )
    found = {}
    for normalize in ("none", "mean"):
        job = make_job(task, "dft", steps=2, normalize=normalize)
        found[normalize] = (job.key, run(job, tmp_path / normalize, lambda event: None), handles[-1].stats)
    assert found["none"][0] != found["mean"][0]
    assert found["none"][1].quality != found["mean"][1].quality
    assert found["none"][2]["effective_learning_rate"] < 0.2
    assert found["mean"][2]["effective_learning_rate"] == pytest.approx(1)
    assert len(handles) == 4  # the counted step and the training, each


def test_a_plan_knows_two_words():
    assert Training().normalize == "none"
    with pytest.raises(ValueError, match="normalize"):
        Training(normalize="sum")
