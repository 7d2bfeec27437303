"""Token cleaning in rounds: the model that earlier rounds trained chooses the tokens of the next part of the data."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel

from tokenwise import fingerprint, scores
from tokenwise.errors import InputError, Problem
from tokenwise.files import write_text
from tokenwise.models.adapters import has_adapters, parameters_fingerprint
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.token_cleaning import clean_tokens, selection_problems

if TYPE_CHECKING:
    from datasets import Dataset

_SETTINGS = "cleaning.json"
_FIGURES = "round.json"


@dataclass(frozen=True)
class CleaningRound:
    """What a round trained on.

    Args:
        number: 0 is the warm-up, which keeps every label.
        rows: rows of the part.
        labels: labels of the part that something predicts.
        kept: how many of them were trained on.
        mean_score: mean over all of them of the loss under the base model minus that under the model of the round
            before, in nats: what this model has learnt of the part before it saw it. None of the warm-up.
        mean_kept_score: the same over those kept.
    """

    number: int
    rows: int
    labels: int
    kept: int
    mean_score: float | None = None
    mean_kept_score: float | None = None

    @property
    def kept_share(self) -> float:
        """The share of the labels that were trained on."""
        return self.kept / self.labels if self.labels else 0.0


@dataclass(frozen=True)
class SelfEvolved:
    """What self-evolving cleaning gives.

    Args:
        model: as the last round trained it.
        rounds: the figures of the warm-up and of each round.
    """

    model: PreTrainedModel
    rounds: list[CleaningRound]


def self_evolving_cleaning(
    model: PreTrainedModel,
    dataset: Dataset,
    train: Callable[[PreTrainedModel, Dataset, int], PreTrainedModel],
    *,
    rounds: int = 4,
    warm_up: float = 0.2,
    keep: float | str = 0.6,
    scope: Literal["dataset", "sequence"] = "dataset",
    folder: str | Path | None = None,
    batch_tokens: int = 8192,
) -> SelfEvolved:
    """Fine-tune a model part by part, each part cleaned by the model as the parts before it made it.

    The first part trains with all labels. Of every other part a token's score is its loss under `model` as it was
    given minus its loss under the model of the round before; the labels of the highest scores stay, and that model
    goes on training on them.

    As in the paper and its code (UCSC-REAL/TokenCleaning): the score, with the base model fixed; reference and starting
    point of a round are the model of the round before; five equal parts in the order of the data, one of them the
    warm-up; 0.6 of the tokens of a part, ranked over the part (``scope="dataset"``) or within each sequence. Ours: a
    warm-up of another size; rows left over by the division, which that code drops, train as well; the base model's
    losses are computed once, before the training; going on after a kill. Stored losses have three digits.

    Args:
        model: the base model; it is trained in place, if `train` does so.
        dataset: tokenised, with ``input_ids`` and ``labels`` (-100 where there is none), in the order of training:
            shuffle it before where neighbours are alike.
        train: called with the model, the part with its remaining labels, and the number of the round from 0; gives the
            trained model, the same object or another. Its collator must keep labels that are given. Adapters are made
            and merged (``merge_and_unload``) inside.
        rounds: how many parts are cleaned.
        warm_up: share of the rows in the first part, which is not cleaned, in (0, 1); the others are of equal size.
        keep: as `clean_tokens` takes it, of each cleaned part.
        scope: within which tokens of a part the ranking is made.
        folder: where to keep scores, and the model of each round with its figures (``round-0`` ...), so that a run that
            was killed goes on after its last finished round when it is called again with the base model and the same
            data. Nowhere unless given.
        batch_tokens: tokens of a forward pass of the scoring at most.

    Raises:
        InputError: when the data or a field cannot be used, `folder` is of another run, `train` gives no model, or this
            is one of several processes.
    """
    bounds = _checked(model, dataset, rounds, warm_up, keep, scope)
    with contextlib.ExitStack() as stack:
        if folder is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            root = Path(folder)
            _claim(root, model, dataset, bounds, keep, scope)
        parts = [dataset.select(range(*bounds[index : index + 2])) for index in range(rounds + 1)]
        rest = dataset.select(range(bounds[1], bounds[-1]))
        options: dict[str, Any] = {"field": "input_ids", "batch_tokens": batch_tokens}
        # Before any training, which may well change this very model.
        base = scores.score(model, rest, root / "base", **options)
        done: list[CleaningRound] = []
        while (figures := _finished(root, len(done))) is not None:
            done.append(figures)
        if done:
            model = _load(root / f"round-{done[-1].number}", model)
        for number in range(len(done), rounds + 1):
            part = parts[number]
            if number == 0:
                labels = _labels(part)
                figures = CleaningRound(0, len(part), labels, labels)
            else:
                scored = root / f"scores-{number}"
                reference = scores.score(model, part, scored, **options)
                joined = reference.join(base.join(part, {"base_nll": "nll"}))
                part = clean_tokens(joined, keep, scope)
                figures = _figures(number, joined, part)
                part = part.remove_columns(["base_nll", "reference_nll"])
            model = _trained(train(model, part, number))
            if folder is not None:
                _save(root / f"round-{number}", model, figures)
            done.append(figures)
    return SelfEvolved(model, done)


def _checked(model: Any, dataset: Dataset, rounds: int, warm_up: float, keep: float | str, scope: str) -> list[int]:
    """Where the parts begin and end among the rows."""
    if not isinstance(model, PreTrainedModel) or has_adapters(model):
        message = f"{type(model).__name__} is no transformers model without adapters."
        raise InputError(Problem("model", message, "Make adapters inside `train`, and merge them there."))
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        message = "runs in one process, and this is one of several."
        raise InputError(Problem("self_evolving_cleaning", message, "Score, clean_tokens and train part by part."))
    problems = selection_problems(dataset, ["input_ids", "labels"], keep, scope)
    if rounds < 1:
        problems.append(Problem("rounds", f"{rounds} is too small.", "Write at least 1."))
    if not 0 < warm_up < 1:
        problems.append(Problem("warm_up", f"{warm_up!r} is no share in (0, 1).", "The paper's is 0.2."))
    for name in ("base_nll", "reference_nll"):
        if name in dataset.column_names:
            problems.append(Problem(f"dataset.{name}", "is there already, and is made here.", "Take it out."))
    if problems:
        raise InputError(problems)
    first = round(len(dataset) * warm_up)
    bounds = [0, *(first + (len(dataset) - first) * index // rounds for index in range(rounds + 1))]
    empty = [index for index in range(rounds + 1) if bounds[index] == bounds[index + 1]]
    if empty:
        message = f"has {len(dataset)} rows, which leaves none for part {empty[0]} of {rounds + 1}."
        raise InputError(Problem("dataset", message, "Give more rows, or fewer rounds."))
    return bounds


def _claim(
    root: Path, model: PreTrainedModel, dataset: Dataset, bounds: list[int], keep: float | str, scope: str
) -> None:
    """Make the folder that of this run, or check that it is."""
    rows = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    ours = {
        "model": parameters_fingerprint(model, True),
        "data": fingerprint.of_value([fingerprint.of_value(row) for row in rows]),
        "parts": bounds,
        "keep": keep,
        "scope": scope,
    }
    path = root / _SETTINGS
    if path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        problems = [
            Problem("folder", f"{str(root)!r} is of a run with another {name!r}.", "Use another folder, or delete it.")
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if problems:
            raise InputError(problems)
        return
    if root.exists() and any(root.iterdir()):
        raise InputError(Problem("folder", f"{str(root)!r} holds other files.", "Name a new or empty folder."))
    write_text(path, json.dumps(ours, indent=1))


def _finished(root: Path, number: int) -> CleaningRound | None:
    path = root / f"round-{number}" / _FIGURES
    if not path.is_file():
        return None
    return CleaningRound(**json.loads(path.read_text(encoding="utf-8")))


def _load(path: Path, like: PreTrainedModel) -> PreTrainedModel:
    loaded: Any = type(like).from_pretrained(path, dtype="auto", use_safetensors=True, trust_remote_code=False)
    model: PreTrainedModel = loaded.to(like.device)
    return model


def _save(path: Path, model: PreTrainedModel, figures: CleaningRound) -> None:
    """Write the model and its figures; the folder is there whole or not at all."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        model.save_pretrained(temporary)
        write_text(temporary / _FIGURES, json.dumps(asdict(figures)))
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _trained(model: Any) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel) or has_adapters(model):
        message = f"gave {type(model).__name__}, not a transformers model without adapters."
        raise InputError(Problem("train", message, "Return the trained model; merge adapters (merge_and_unload)."))
    return model


def _labels(part: Dataset) -> int:
    """Labels that something predicts: those of the first token are not."""
    return sum(label != IGNORED for row in part.with_format(None)["labels"] for label in row[1:])


def _figures(number: int, joined: Dataset, cleaned: Dataset) -> CleaningRound:
    labels = kept = 0
    total = of_kept = 0.0
    for row, after in zip(joined.with_format(None), cleaned.with_format(None)["labels"], strict=True):
        columns = (row["labels"], row["base_nll"], row["reference_nll"], after)
        for label, base, reference, left in list(zip(*columns, strict=True))[1:]:
            if label != IGNORED:
                labels, total = labels + 1, total + base - reference
                if left != IGNORED:
                    kept, of_kept = kept + 1, of_kept + base - reference
    return CleaningRound(number, len(cleaned), labels, kept, total / max(labels, 1), of_kept / max(kept, 1))
