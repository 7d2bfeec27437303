"""Selection of tokens by what a reference has gained over the base model (token cleaning)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.method import Card, Paper
from tokenwise.policies.budget import Keep, parse_keep
from tokenwise.policies.selection import top_share
from tokenwise.signals.head import IGNORED
from tokenwise.weighting.base import Reduction, Scope, State, TokenBatch, TokenWeighter

if TYPE_CHECKING:
    from datasets import Dataset


class TokenCleaning(TokenWeighter):
    """Train on the tokens that a reference, fine-tuned on some of the data, predicts best compared with the base model.

    The score of a token is its loss under the model that training started from minus its loss under the reference.
    Both are fixed, so the same tokens train in every epoch. `clean_tokens` ranks the tokens of a whole data set, as
    the paper's main results do; here they are ranked within sequences, or within what trains together.
    """

    card: ClassVar[Card] = Card(
        id="weighting/token_cleaning",
        paper=Paper(
            title="Token Cleaning: Fine-Grained Data Selection for LLM Supervised Fine-Tuning",
            arxiv="2502.01968",
            venue="ICML 2025",
        ),
        needs=("columns base_nll and reference_nll, aligned with labels",),
        status="VERIFIED",
        checked="the official selection, per sample and over a data set, on stored scores; the official code rounds "
        "the count down where we round to the nearest, and ranks a label on the first token, which nothing predicts",
        control="weighting/random",
    )
    reads: ClassVar[frozenset[str]] = frozenset({"base_nll", "reference_nll"})
    reduction: ClassVar[Reduction] = "nonzero_mean"
    selects: ClassVar[bool] = True

    keep: Keep = 0.6
    """What stays of each scope's tokens."""
    scope: Scope = "sequence"
    """Within which tokens the ranking is made."""

    def weights(self, batch: TokenBatch, state: State | None = None) -> Tensor:
        assert batch.base_nll is not None
        assert batch.reference_nll is not None
        return top_share(batch.base_nll - batch.reference_nll, self.keep, batch.groups(self.scope)).float()


def selection_problems(dataset: Dataset, columns: list[str], keep: float | str, scope: str) -> list[Problem]:
    """What keeps the tokens of a data set from being chosen: missing columns, or fields that say nothing."""
    problems = [
        Problem(f"dataset.{name}", "is missing.", f"There are {', '.join(dataset.column_names)}.")
        for name in columns
        if name not in dataset.column_names
    ]
    try:
        parse_keep(keep)
    except ValueError as error:
        problems.append(Problem("keep", f"{keep!r} {error}."))
    if scope not in ("dataset", "sequence"):
        problems.append(Problem("scope", f"{scope!r} is unknown.", "Write 'dataset' or 'sequence'."))
    return problems


def clean_tokens(
    dataset: Dataset, keep: float | str = 0.6, scope: Literal["dataset", "sequence"] = "dataset"
) -> Dataset:
    """Leave labels only on the tokens that `TokenCleaning` would train on, ranked over the whole data set.

    The result trains with any trainer and any method, as long as the collator keeps labels that are given
    (``DataCollatorForLanguageModeling`` makes its own). `self_evolving_cleaning` does it part by part, each with the
    model trained on those before.

    Args:
        dataset: with columns ``labels`` (-100 where there is none), ``base_nll`` and ``reference_nll`` (nats), each
            row a list of the same length; index t speaks of token t, and the first entries are not read.
        keep: what stays: a share in (0, 1], or ``"N tokens"``; of the labels of the data set, or of each sequence.
        scope: within which tokens the ranking is made. Ties go to the earlier token.

    Returns:
        The data set with -100 for the other labels, including that of the first token, which nothing predicts.

    Raises:
        InputError: when a column is missing, its length is not that of the labels, or `keep` is no amount.
    """
    columns = ["labels", "base_nll", "reference_nll"]
    problems = selection_problems(dataset, columns, keep, scope)
    if problems:
        raise InputError(problems)
    keep = parse_keep(keep)
    scores, eligible = [], []
    for index, row in enumerate(dataset.select_columns(columns).with_format("torch")):
        labels, base, reference = (row[name] for name in columns)
        if not len(labels) == len(base) == len(reference):
            lengths = f"{len(labels)}, {len(base)} and {len(reference)}"
            raise InputError(
                Problem(f"dataset[{index}]", f"has {lengths} labels, base_nll and reference_nll.", "Align them.")
            )
        mask = labels != IGNORED
        mask[:1] = False
        eligible.append(mask)
        scores.append((base - reference)[mask])
    counts = [len(part) for part in scores]
    groups = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) if scope == "sequence" else None
    kept = top_share(torch.cat(scores), keep, groups).split(counts)

    def relabel(labels: Any, index: int) -> dict[str, Any]:
        mask = eligible[index].clone()
        mask[eligible[index]] = kept[index]
        return {"labels": torch.as_tensor(labels).where(mask, IGNORED).tolist()}

    return dataset.map(relabel, input_columns="labels", with_indices=True, desc="Cleaning tokens")
