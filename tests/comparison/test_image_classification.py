import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from transformers import ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import tokenwise as tw
from small_images import CLASSES, class_folders, classifier, content, image, image_plan, parquet_file
from tokenwise.cli.main import main
from tokenwise.comparison import image_classification
from tokenwise.comparison.answer import conclude
from tokenwise.comparison.images import Pictures, find_images, read_pictures
from tokenwise.comparison.plan import read_plan
from tokenwise.comparison.report import write_report
from tokenwise.comparison.tasks import TASKS
from tokenwise.errors import InputError
from tokenwise.models.flops import FlopMeter
from tokenwise.models.images import ImageInputs

NUMBERED = dict(enumerate(CLASSES))


def problems(call):
    with pytest.raises(InputError) as found:
        call()
    return [str(problem) for problem in found.value.problems]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A plan, run whole in this process; one run for jobs that are the same."""
    folder = tmp_path_factory.mktemp("images")
    plan = read_plan(image_plan(folder))
    plan.prepare(folder / "out")
    done = {}
    results = []
    for job in plan.jobs(folder / "out"):
        if job.key not in done:
            done[job.key] = TASKS["image_classification"].run(job, folder / "out", lambda event: None)
        values = vars(done[job.key])
        results.append(type(done[job.key])(**{**values, "job": job}))
    summary = {**plan.summary(), "seeds": [0, 1], "budget": str(plan.budget), "folder": "out", "command": "again"}
    return folder, plan, results, conclude(results, summary), summary


def test_methods_run_at_every_budget_beside_a_random_control(compared):
    _, plan, results, _, _ = compared
    shown = [(entry.label, entry.role, entry.control, entry.series) for entry in plan.entries]
    assert shown == [
        ("dense", "baseline", None, "dense"),
        ("tome 0.75", "candidate", "random_drop 0.75", "tome"),
        ("tome 0.5", "candidate", "random_drop 0.5", "tome"),
        ("evit 0.75", "candidate", "random_drop 0.75", "evit"),
        ("evit 0.5", "candidate", "random_drop 0.5", "evit"),
        ("random_drop 0.75", "control", None, "random_drop"),
        ("random_drop 0.5", "control", None, "random_drop"),
    ]
    # What draws nothing runs once for both seeds, what draws runs once for each.
    keys = {}
    for result in results:
        keys.setdefault(result.job.label, []).append(result.job.key)
    assert len(keys["tome 0.5"]) == 2
    assert len(set(keys["tome 0.5"])) == 1
    assert len(set(keys["random_drop 0.5"])) == 2
    assert {result.job.method["random_drop"]["seed"] for result in results if "random_drop" in result.job.method} == {
        0,
        1,
    }


def test_quality_and_costs_are_those_of_the_reduced_model(compared):
    folder, _, results, conclusion, _ = compared
    [result] = [result for result in results if result.job.label == "tome 0.5" and result.job.seed == 0]
    model = ViTForImageClassification.from_pretrained(folder / "vit").eval()
    inputs = ImageInputs(folder / "vit", model.config)
    pixels = inputs([image(number) for number in range(20)])
    with torch.no_grad():
        dense = model(pixel_values=pixels).logits.argmax(-1).tolist()
        with tw.reduce(model, tw.ToMe(keep=0.5)) as handle:
            predictions = model(pixel_values=pixels).logits.argmax(-1).tolist()
            with FlopMeter() as meter:
                model(pixel_values=pixels[:8])
    quality = result.quality
    assert (quality.predictions, quality.dense) == (predictions, dense)
    assert quality.labels == [number % 2 for number in range(20)]
    assert quality.value == pytest.approx(100 * np.mean(np.not_equal(quality.labels, predictions)))
    costs = result.costs
    assert costs.flops == meter.flops / 8
    assert costs.token_share == handle.stats["mean_share"] == pytest.approx(0.5, abs=0.03)
    assert (costs.tokens_before, costs.tokens_after) == (17, handle.stats["tokens_after"])
    # Counted and closed form differ by what is outside the blocks and by the method's own similarities.
    assert 0.8 < costs.block_flops / costs.flops < 1
    assert costs.scoring_seconds > 0
    [base] = [row for row in conclusion.rows if row.label == "dense"]
    assert base.costs.scoring_seconds is None
    assert base.details[next(m for m in base.details if m.name == "agreement")] == 100
    row = next(row for row in conclusion.rows if row.label == "tome 0.5")
    assert row.relative_seconds == pytest.approx(
        result.costs.wall_seconds / result.costs.dense_seconds / (base.costs.wall_seconds / base.costs.dense_seconds)
    )


def test_every_method_is_compared_at_its_own_budget(compared):
    _, _, _, conclusion, _ = compared
    assert conclusion.family == "reduction"
    assert len(conclusion.points) == 2
    assert conclusion.points[0].startswith("Keep 0.75: ")
    assert conclusion.winner is None
    for row in conclusion.rows:
        assert (row.spread is not None) == (row.role == "control"), row.label
        assert row.versus_baseline is not None or row.role == "baseline"


def test_the_report_draws_what_was_kept(compared, tmp_path):
    _, _, results, conclusion, summary = compared
    pictures = results[1].example["pictures"]
    assert len(pictures) == image_classification.EXAMPLES
    assert pictures[0]["grid"] == [4, 4]
    assert len(pictures[0]["group"]) == 16
    dropped = next(r for r in results if r.job.label == "random_drop 0.5").example["pictures"][0]["group"]
    assert -1 in dropped
    write_report(tmp_path / "report.html", conclusion, results, "plan", summary)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7 * image_classification.EXAMPLES
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "in blocks" in page
    assert "scoring" in page
    assert "--export" not in page


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch, capsys):
    plan = image_plan(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    [found] = problems(lambda: read_plan(plan))
    assert "pip install 'tokenwise[vision]'" in found
    assert main(["reduce", str(tmp_path / "vit"), "--method", "tome", str(plan)]) == 2
    assert "tokenwise[vision]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("folder", None),
        ("parquet", None),
        ("names", None),
        ("text", [*CLASSES, "BLUE", "light_red"]),
        ("dataset", None),
    ],
)
def test_images_are_read_from_folders_parquet_and_datasets(tmp_path, kind, labels):
    if kind == "folder":
        path = class_folders(tmp_path / "data", 4)
    elif kind == "dataset":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        rows = {"image": [{"bytes": content(n), "path": None} for n in range(4)], "label": [0, 1, 0, 1]}
        path = tmp_path / "data"
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    else:
        names = {"classes": json.dumps(CLASSES[::-1])} if kind == "names" else None
        path = parquet_file(tmp_path / "data.parquet", 4, labels or [0, 1, 0, 1], names)
    found = read_pictures(find_images(str(path), tmp_path), "image", "label", None, NUMBERED, "data")
    assert len(found) == 4
    # Names decide where there are some: these files number the classes the other way round.
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
    assert found.labels.tolist() == {"folder": [0, 0, 1, 1], "names": [1, 0, 1, 0]}.get(kind, [0, 1, 0, 1])
    order = {"folder": [0, 2, 1, 3]}.get(kind, [0, 1, 2, 3])
    with (tmp_path / "stored.npz").open("wb") as stream:
        found.save(stream)
    again = Pictures.load(tmp_path / "stored.npz")
    for place, number in enumerate(order):
        assert np.array_equal(np.asarray(again.image(place)), np.asarray(image(number)))


def test_a_limit_takes_images_from_everywhere(tmp_path):
    path = class_folders(tmp_path / "data", 12)
    found = read_pictures((path,), "image", "label", 4, NUMBERED, "data")
    assert (len(found), found.total) == (4, 12)
    assert found.labels.tolist() == [0, 0, 1, 1]


def test_bad_images_are_named(tmp_path):
    path = class_folders(tmp_path / "data", 3)
    (path / "blue" / "broken.png").write_bytes(b"no image")
    (path / "green").mkdir()
    (path / "green" / "a.png").write_bytes(content(1))
    first, second = problems(lambda: read_pictures((path,), "image", "label", None, NUMBERED, "data"))
    assert "broken.png" in first
    assert "'green' is none of the model's" in second
    numbers = parquet_file(tmp_path / "numbers.parquet", 2, [0, 7])
    [found] = problems(lambda: read_pictures((numbers,), "image", "label", None, NUMBERED, "data"))
    assert "7 is none of the model's 2 classes" in found
    [found] = problems(lambda: read_pictures((numbers,), "picture", "label", None, NUMBERED, "data"))
    assert "no field 'picture'" in found
    [found] = problems(lambda: find_images("none.parquet", tmp_path))
    assert "does not exist" in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ["faster_vlm"]}, "works at the site 'input'"),
        ({"methods": ["dft"]}, "is no token reduction"),
        ({"methods": [{"tome": {"keep": 0.5}}]}, "tome.keep: is set by the plan"),
        ({"methods": [{"tome": {"r": 2}}]}, "a field of its own says how many"),
        ({"methods": ["tom"]}, "Did you mean 'tome'?"),
        ({"budget": {"unit": "keep", "amounts": [1.5]}}, "budget.amounts"),
        ({"budget": {"unit": "tokens", "amounts": [0.5]}}, "budget.unit"),
        ({"training": {}}, "training: is no part of a plan of image_classification"),
        ({"task": {"model": "./nowhere"}}, "task.model"),
    ],
)
def test_a_bad_plan_is_refused_before_anything_runs(tmp_path, changes, expected):
    found = problems(lambda: read_plan(image_plan(tmp_path, **changes)))
    assert any(expected in problem for problem in found), found


def test_the_example_is_a_plan_to_start_from(tmp_path):
    written = Path(__file__).parents[2] / "examples" / "image_classification" / "plan.yaml"
    plan = yaml.safe_load(written.read_text(encoding="utf-8"))
    plan["task"] |= {"model": str(classifier(tmp_path / "vit"))}
    plan["task"]["data"]["eval"] = str(class_folders(tmp_path / "images", 4))
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    labels = [entry.label for entry in read_plan(tmp_path / "plan.yaml").entries]
    assert labels[:2] == ["dense", "tome 0.75"]
    assert "evit without fusion 0.25" in labels


def test_a_comparison_of_reductions_exports_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(image_plan(tmp_path)), "--export", "best"]) == 2
    assert "trains no model" in capsys.readouterr().err


def test_flops_as_the_budget(tmp_path):
    plan = read_plan(image_plan(tmp_path, budget={"unit": "flops", "amounts": [0.5]}, methods=["tome"]))
    assert [entry.label for entry in plan.entries] == ["dense", "tome", "random_drop"]
    assert plan.entries[1].method.keep == "0.5 flops"
    assert str(plan.budget) == "0.5 of the FLOPs"
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad(), tw.reduce(model, plan.entries[1].method) as handle:
        model(pixel_values=torch.zeros(1, 3, 16, 16))
    assert 0.4 < handle.stats["macs_share"] <= 0.5


def test_the_models_own_processor_prepares_images(tmp_path):
    classifier(tmp_path / "vit")
    config = ViTForImageClassification.from_pretrained(tmp_path / "vit").config
    plain = ImageInputs(tmp_path / "vit", config)
    assert "no image processor" in plain.described
    assert plain([image(1)]).numpy() == pytest.approx(
        np.asarray(image(1), dtype=np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    )
    assert np.array_equal(plain.shown(plain([image(1)])[0]), np.asarray(image(1)))
    own = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    own.save_pretrained(tmp_path / "vit")
    found = ImageInputs(tmp_path / "vit", config)
    assert "own ViTImageProcessor" in found.described
    expected = (np.asarray(image(1)) / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    assert found([image(1)])[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)
    assert np.array_equal(found.shown(found([image(1)])[0]), np.asarray(image(1)))
