"""Writing out a model that a comparison has trained."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenwise.comparison.answer import Conclusion
from tokenwise.comparison.records import Result
from tokenwise.errors import InputError, Problem, nearest


def export_winner(
    folder: Path, results: Sequence[Result], conclusion: Conclusion, out: Path, method: str | None = None
) -> Path:
    """Write the best run of a method: model and tokenizer, ready to load, and their origin in ``tokenwise.json``.

    Args:
        folder: the comparison's folder.
        results: its results.
        conclusion: names the winner.
        out: where to; made if missing, appears whole or not at all.
        method: label of the method; the winner's unless given.

    Returns:
        `out`.

    Raises:
        InputError: when there is no winner and no method is named, no method has this label, none of its runs
            finished, its model is gone, or `out` holds something.
    """
    best = _best_run(results, conclusion.winner, method)
    model = folder / (best.model_dir or "")
    if best.model_dir is None or not model.is_dir():
        message = f"the model of {best.job.label!r} (seed {best.job.seed}) is not in {str(folder)!r} any more."
        fix = f"Remove {str(folder / 'runs' / best.job.key)!r} and compare again, and it is trained again."
        raise InputError(Problem("--export", message, fix))
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        whole = Path(temporary, "model")
        shutil.copytree(model, whole)
        record = json.dumps(_record(best), indent=2, ensure_ascii=False)
        (whole / "tokenwise.json").write_text(record + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        whole.rename(out)
    return out


def check_target(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        InputError: when `out` exists and is not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        fix = "Name another folder, or remove this one."
        raise InputError(Problem("--export", f"{str(out)!r} exists and is not an empty folder.", fix))


def check_label(label: str, labels: Sequence[str]) -> None:
    """Refuse a label that no method of the comparison has.

    Raises:
        InputError: with the nearest label.
    """
    if label not in labels:
        raise InputError(
            Problem("--method", f"no method of this comparison is called {label!r}.", nearest(label, labels))
        )


def _best_run(results: Sequence[Result], winner: str | None, method: str | None) -> Result:
    """The finished run of the method with the best held-out quality."""
    runs = [result for result in results if result.job.kind == "run"]
    labels = list(dict.fromkeys(run.job.label for run in runs))
    label = method if method is not None else winner
    if label is None:
        fix = f"Name one with --method: {', '.join(labels)}."
        raise InputError(Problem("--export", "there is no winner to export: no difference was shown.", fix))
    check_label(label, labels)
    finished = [(run.quality.value, run) for run in runs if run.job.label == label and run.quality is not None]
    if not finished:
        raise InputError(
            Problem("--method", f"no run of {label!r} has finished.", "Compare again: failed runs are retried.")
        )
    return min(finished, key=lambda entry: entry[0])[1]


def _record(result: Result) -> dict[str, Any]:
    """How the model came about. Says what files held, not where they lay: exported models travel."""
    job, quality = result.job, result.quality
    assert quality is not None
    task = {name: value for name, value in job.task.items() if name not in job.LOCATIONS}
    if not isinstance(job.task["model"], str):
        task["model"] = job.task["model"]
    return {
        "method": job.method,
        "label": job.label,
        "seed": job.seed,
        "task": task,
        "budget": job.budget,
        "reference": job.reference,
        "held_out": {
            f"{measure.name} ({measure.unit})": value
            for measure, value in {quality.measure: quality.value, **quality.details}.items()
        },
        "inputs": job.inputs,
        "versions": result.versions,
        "key": job.key,
    }
