"""Unlearning from start to end: train, and measure before and after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenwise.models.frozen import evaluating
from tokenwise.models.head import base_of, last_hidden, output_head
from tokenwise.signals.head import IGNORED, row_tiles, tile_rows
from tokenwise.weighting.apply import weigh
from tokenwise.weighting.forward import shifted
from tokenwise.weighting.unlearning import Unlearner
from tokenwise.weighting.unlearning_data import Row, UnlearningCollator, pair


@dataclass(frozen=True)
class Recall:
    """How well a model knows some answers.

    Args:
        examples: how many answers.
        nll: negative log-likelihood of an answer, mean over its tokens and then over the answers, in nats per token.
        probability: exp(-mean nll) of an answer, mean over the answers: 1 where all are certain.
        exact: share of the answers that greedy decoding gives word for word.
    """

    examples: int
    nll: float
    probability: float
    exact: float


@torch.no_grad()
def recall(model: nn.Module, rows: Sequence[Row], pad_token_id: int, batch_size: int = 16) -> Recall:
    """How well a causal language model knows the labelled part of each row.

    No text is generated: greedy decoding gives an answer exactly where each of its tokens is the most probable one
    after those before it.

    Args:
        model: the model, or a PEFT model around it; evaluated without dropout.
        rows: with ``input_ids`` and ``labels``.
        pad_token_id: any id the model knows.
        batch_size: rows at once.
    """
    base = base_of(model)
    head = output_head(base)
    collate = UnlearningCollator(pad_token_id)
    losses: list[float] = []
    exact = 0
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = [{name: row[name] for name in ("input_ids", "labels")} for row in rows[start : start + batch_size]]
            batch = {name: values.to(base.device) for name, values in collate(part).items()}
            targets = shifted(batch.pop("labels"), IGNORED)
            hidden = last_hidden(base, **batch)
            kept = targets.ne(IGNORED)
            states, labels, sequence = hidden[kept], targets[kept], kept.nonzero()[:, 0]
            nll, right = _scores(states, labels, head)
            count = torch.bincount(sequence, minlength=len(part))
            total = torch.zeros(len(part), dtype=nll.dtype, device=nll.device).index_add_(0, sequence, nll)
            losses += (total / count).tolist()
            exact += int((torch.bincount(sequence[right], minlength=len(part)) == count).sum())
    found = torch.tensor(losses, dtype=torch.float64)
    return Recall(len(rows), found.mean().item(), found.neg().exp().mean().item(), exact / len(rows))


def _scores(states: Tensor, labels: Tensor, head: Any) -> tuple[Tensor, Tensor]:
    """Loss of each label, and whether it is the most probable token."""
    losses, right = [], []
    for part in row_tiles(labels.shape[0], tile_rows(head.vocabulary)):
        logits = head.logits(states[part].to(head.weight.dtype)).float()
        losses.append(nn.functional.cross_entropy(logits, labels[part], reduction="none"))
        right.append(logits.argmax(1) == labels[part])
    return torch.cat(losses), torch.cat(right)


@dataclass(frozen=True)
class Unlearned:
    """What an unlearning did.

    Args:
        before: recall of each set of rows before, by name: ``forget``, ``retain``, and those given to be measured.
        after: the same after.
        stats: of the handle: mean of each term over the training.
        steps: optimizer steps.
    """

    before: dict[str, Recall]
    after: dict[str, Recall]
    stats: dict[str, float]
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def unlearn(
    model: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    method: Unlearner,
    *,
    pad_token_id: int,
    arguments: TrainingArguments | None = None,
    measure: Mapping[str, Sequence[Row]] | None = None,
    progress: Callable[[int, int, float | None], object] | None = None,
    **training: Any,
) -> Unlearned:
    """Train a model in place with transformers' Trainer so that it forgets some rows and keeps others.

    Args:
        model: a causal language model, or a PEFT model around one (which is then its own reference).
        forget: rows with ``input_ids`` and ``labels``; see `unlearning_data.read_examples`.
        retain: the same; a method without a retain term only measures on them.
        method: the method.
        pad_token_id: any id the model knows.
        arguments: the Trainer's; or give single ones by keyword (``max_steps=100, learning_rate=1e-5``).
        measure: more rows to measure on, by name.
        progress: called after each step with steps done, steps in all, and the last loss.
        training: TrainingArguments by keyword, where `arguments` is not given.

    Raises:
        InputError: when the data, the model or the settings cannot be used, before any work starts.
    """
    pairs = pair(forget, retain, seed=training.get("seed", 42) if arguments is None else arguments.seed)
    dataset: Dataset[Any] = pairs if method.retains() else _Forget(forget)
    sets = {"forget": forget, "retain": retain, **(measure or {})}
    with tempfile.TemporaryDirectory() as folder:
        if arguments is None:
            quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1}
            pin = {"dataloader_pin_memory": torch.cuda.is_available()}
            arguments = TrainingArguments(**{"output_dir": folder, **quiet, **pin, **training})
        callbacks: list[TrainerCallback] = [] if progress is None else [_Progress(progress)]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=UnlearningCollator(pad_token_id),
            callbacks=callbacks,
        )
        if progress is not None:
            _silence(trainer)
        with weigh(trainer, method) as handle:
            before = {name: recall(model, rows, pad_token_id) for name, rows in sets.items()}
            trainer.train()
        after = {name: recall(model, rows, pad_token_id) for name, rows in sets.items()}
    return Unlearned(before, after, dict(handle.stats), trainer.state.global_step)


class _Forget(Dataset[Any]):
    """Rows to forget alone, for methods without a retain term."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "forget": [1] * len(self.rows[index]["input_ids"])}


def _silence(trainer: Trainer) -> None:
    """Who reports progress in a way of their own does not want every log line printed as well."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int, float | None], object]):
        self.report = report

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.report(state.global_step, state.max_steps, (logs or {}).get("loss"))
