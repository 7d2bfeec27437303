"""What a comparison writes down: jobs, results, and their files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from tokenwise.comparison.quality import Quality, read_quality
from tokenwise.files import write_text


@dataclass(frozen=True)
class Job:
    """One process's worth of work: train one method with one seed, or train a reference model.

    Everything that decides the outcome is in here as plain JSON values, so that `key` can name the result.

    Args:
        kind: a ``run`` that is compared, or the training of a ``reference`` model.
        label: the method's (or reference's) name in this comparison, unique within it.
        seed: seed of the initial weights, the data order and the method.
        method: what to train with, as `Method.spec` gives it; a reference trains uniformly.
        role: a ``baseline``, a ``control`` (random choice at the same budget) or a ``candidate``.
        task: the resolved task: model, tokenizer, data paths, sequence length, training settings.
        budget: ``{"unit": ..., "amount": ...}``.
        reference: name of the reference this job waits for, or None.
        inputs: fingerprints of what the job reads (data, model, own code) and of the package versions. They stand in
            the key for the entries of `task` that say where these things lie (`LOCATIONS`).
        control: label of the random choice at the same budget that this method must also beat, or None.
        reference_costs: what the reference cost, as the fields of `Costs`, where no job of the comparison makes it;
            None where there is nothing to charge.
        series: the method's name without its budget, where a comparison has several; else empty.
        draws: whether the seed decides anything; one run stands for all seeds where it does not.
    """

    LOCATIONS: ClassVar[frozenset[str]] = frozenset(
        {
            *("model", "tokenizer", "train", "eval", "train_blocks", "held_out_windows", "train_rows", "held_out_rows"),
            *("method_folder", "reference"),
        }
    )

    kind: Literal["run", "reference"]
    label: str
    seed: int
    method: dict[str, Any]
    role: Literal["baseline", "control", "candidate"]
    task: dict[str, Any]
    budget: dict[str, Any]
    reference: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    control: str | None = None
    reference_costs: dict[str, Any] | None = None
    series: str = ""
    draws: bool = True

    @property
    def key(self) -> str:
        """A name for the result that changes whenever anything that decides it changes. Labels and roles do not count,
        nor does where the files lie, nor what a reference cost elsewhere."""
        others = ["label", "role", "control", "reference_costs", "series", "draws", *["seed"] * (not self.draws)]
        decisive = {name: value for name, value in asdict(self).items() if name not in others}
        decisive["task"] = {name: value for name, value in self.task.items() if name not in self.LOCATIONS}
        text = json.dumps(decisive, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass
class Costs:
    """What a run consumed. None means "not measured", never zero.

    Args:
        flops: of the training steps, forward and backward, the method's own scoring included; evaluation excluded.
        wall_seconds: training time, evaluation and loading excluded.
        peak_memory_bytes: high-water mark of the process while training, minus nothing.
        tokens_seen: labels that went through the forward pass.
        tokens_trained: labels with a weight other than zero.
        steps: optimizer steps.
        seconds_comparable: whether nothing else ran beside it that this comparison started.

    Where a trained model is measured and not trained, `flops` and `wall_seconds` are of one item (an image, say), and:

    Args:
        dense_seconds: time of one item by the dense model, measured in turn with the method in the same process.
        scoring_seconds: of `wall_seconds`, what looking for the tokens to keep takes.
        block_flops: of one item in the encoder's blocks, by the closed form.
        tokens_before: tokens of one item that enter the encoder.
        tokens_after: those that leave it.
        token_share: share of the tokens that the feed-forward layers work on, averaged over the blocks.
        cache_bytes: what the keys and values of one item's prompt take, as they are stored.
        full_cache_bytes: what they would take if all were stored.
        decode_seconds: time of writing one token after a prompt.
        full_decode_seconds: the same with the full cache.
        decode_scoring_seconds: of `decode_seconds`, what the method's own work takes.
        tokens_read: of those stored what writing a token reads, where a method reads only some; a mean over layers.
    """

    flops: float | None = None
    wall_seconds: float | None = None
    peak_memory_bytes: int | None = None
    tokens_seen: int | None = None
    tokens_trained: int | None = None
    steps: int | None = None
    seconds_comparable: bool = True
    dense_seconds: float | None = None
    scoring_seconds: float | None = None
    block_flops: float | None = None
    tokens_before: float | None = None
    tokens_after: float | None = None
    token_share: float | None = None
    cache_bytes: float | None = None
    full_cache_bytes: float | None = None
    decode_seconds: float | None = None
    full_decode_seconds: float | None = None
    decode_scoring_seconds: float | None = None
    tokens_read: float | None = None


@dataclass
class Point:
    """One evaluation on the way: the share of the budget spent, costs so far, and the quality.

    `held_out`, of the quality's `curve_measure`, is taken on the same items every time (all of them, or the first ones
    up to a fixed number); `train` is the mean unweighted training loss since the point before, in nats per token.
    """

    share: float
    tokens_seen: int
    tokens_trained: int | None
    flops: float | None
    wall_seconds: float
    held_out: float
    train: float | None = None


@dataclass
class Result:
    """The outcome of one job.

    Args:
        job: the job itself.
        status: ``finished``, or ``failed`` with a `reason` in one sentence.
        quality: None when failed.
        costs: of this job alone.
        reference_costs: what training the reference, or scoring the data with it, cost (charged to each run that uses
            it); None without one.
        curve: evaluations on the way, in order.
        weights: what the weights did, over all of the training, by the names of `Weighing.stats`: mean weight, kept
            share, effective sample size and learning rate, gradient shares by decile of weight.
        example: one held-out piece of text as the trained method sees it: ``{"tokens": [...], "weights": [...]}``,
            the first token (which has no prediction) with weight None; or images with what was kept of them:
            ``{"pictures": [...]}``, each as `pictures.picture_of` gives it.
        model_dir: where the trained model lies, relative to the comparison's folder.
        versions: package versions, machine, threads.
    """

    job: Job
    status: Literal["finished", "failed"]
    reason: str = ""
    quality: Quality | None = None
    costs: Costs = field(default_factory=Costs)
    reference_costs: Costs | None = None
    curve: list[Point] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    example: dict[str, list[Any]] | None = None
    model_dir: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all. NaN and infinity are kept as such."""
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["job"] = Job(**values["job"])
        values["costs"] = Costs(**values["costs"])
        if values["quality"] is not None:
            values["quality"] = read_quality(values["quality"])
        if values["reference_costs"] is not None:
            values["reference_costs"] = Costs(**values["reference_costs"])
        values["curve"] = [Point(**point) for point in values["curve"]]
        return cls(**values)
