"""Selection of documents by what a large model has over a small one (MiniPLM's difference sampling)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.policies.budget import parse_keep
from tokenwise.policies.selection import top_share

if TYPE_CHECKING:
    from datasets import Dataset


def difference_sampling(nll_small: Tensor, nll_large: Tensor, keep: float | str = 0.5) -> Tensor:
    """Which documents a large model predicts best compared with a small one: hard ones that can be learnt.

    MiniPLM (2410.17215, ICLR 2025) pre-trains on these alone: text that is easy for both models, or noise to both,
    goes. Checked against the official scripts, which divide a document's loss by its tokens, subtract, and keep the
    largest; they round the count down, here it is rounded to the nearest.

    Args:
        nll_small: mean loss per token of each document under the small model, in nats, [documents].
        nll_large: the same under the large model.
        keep: what stays of the documents: a share in (0, 1] (half of them in the paper).

    Returns:
        Boolean mask, [documents]. Ties go to the earlier document.

    Raises:
        InputError: when the shapes differ or `keep` is no share.
    """
    if nll_small.shape != nll_large.shape or nll_small.dim() != 1:
        shapes = f"{tuple(nll_small.shape)} and {tuple(nll_large.shape)}"
        raise InputError(Problem("nll_large", f"the losses have shapes {shapes}.", "Give one number per document."))
    try:
        keep = parse_keep(keep)
    except ValueError as error:
        raise InputError(Problem("keep", f"{keep!r} {error}.")) from None
    return top_share(nll_small - nll_large, keep)


def sample_by_difference(
    dataset: Dataset, small: str = "small_nll", large: str = "large_nll", keep: float | str = 0.5
) -> Dataset:
    """The documents of a data set that `difference_sampling` keeps, in their order.

    Args:
        dataset: its rows are documents.
        small: name of the column with the losses under the small model: one number per document (the mean per token),
            or a list with the loss of each token, whose first entry is not read.
        large: the same for the large model.
        keep: as in `difference_sampling`.

    Raises:
        InputError: when a column is missing, a document has no loss, or `keep` is no share.
    """
    problems = [
        Problem(f"dataset.{name}", "is missing.", f"There are {', '.join(dataset.column_names)}.")
        for name in (small, large)
        if name not in dataset.column_names
    ]
    if problems:
        raise InputError(problems)
    kept = difference_sampling(_document_means(dataset, small), _document_means(dataset, large), keep)
    return dataset.select(kept.nonzero().squeeze(1).tolist())


def _document_means(dataset: Dataset, name: str) -> Tensor:
    means = []
    for index, values in enumerate(dataset.with_format("torch")[name]):
        losses = torch.as_tensor(values, dtype=torch.float64)
        if losses.dim() and len(losses) < 2:
            raise InputError(Problem(f"dataset[{index}].{name}", "has no loss.", "Leave such documents out."))
        means.append(losses[1:].mean() if losses.dim() else losses)
    return torch.stack(means)
