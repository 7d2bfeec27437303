"""Weight Aligning: bring the rows of new classes or new tokens to the norm of the old ones, after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenwise.errors import InputError, Problem
from tokenwise.method import Handle
from tokenwise.models.classifier import classifier_head, is_classifier
from tokenwise.models.head import base_of

Rows = Sequence[int] | slice | Tensor


@torch.no_grad()
def align_new_rows(model_or_weight: nn.Module | Tensor, new_rows: Rows, old_rows: Rows | None = None) -> Handle:
    """Scale the rows of what was added to a model so that their mean norm is that of the old rows.

    What is added late (classes to a classifier, tokens to a vocabulary) ends with rows of another norm, and wins or
    loses by it whatever the input (Weight Aligning, arXiv 1911.07053). All new rows get one factor, so that their
    directions and the norms among them stay; old rows and biases are not touched.

    Args:
        model_or_weight: a weight [rows, hidden]; or a classifier, whose last layer is aligned; or another transformers
            model, whose input embedding and output head are aligned, each by its own factor, tied ones once.
        new_rows: indices of the new classes or tokens, or a slice.
        old_rows: those to compare with; all others unless given.

    Returns:
        A handle: ``stats`` has ``factor`` (and ``factor_output`` where a second matrix was scaled); ``undo()`` puts the
        rows back exactly as they were.

    Raises:
        InputError: when a row does not exist, is named twice or on both sides, a side is empty or all zero.
    """
    handle = Handle()
    weights = _weights(model_or_weight)
    prepared = [(name, weight, *_factor(weight, new_rows, old_rows)) for name, weight in weights.items()]
    for name, weight, rows, factor in prepared:
        before = weight[rows].clone()
        weight[rows] = (before * factor).to(weight.dtype)
        handle.on_undo(_restore(weight, rows, before))
        handle.stats[name] = factor
    return handle


def _restore(weight: Tensor, rows: Tensor, before: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def restore() -> None:
        weight[rows] = before

    return restore


def _weights(target: nn.Module | Tensor) -> dict[str, Tensor]:
    if isinstance(target, Tensor):
        if target.dim() != 2:
            raise InputError(Problem("weight", f"has shape {tuple(target.shape)}.", "Give [rows, hidden]."))
        return {"factor": target}
    model: Any = base_of(target)
    if is_classifier(model):
        return {"factor": classifier_head(model).weight}
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            Problem("model", f"{type(model).__name__} is no transformers model.", "Give the weight itself.")
        )
    found = {"factor": model.get_input_embeddings().weight}
    head = model.get_output_embeddings()
    if head is not None and head.weight is not found["factor"]:
        found["factor_output"] = head.weight
    return found  # type: ignore[return-value]


def _indices(rows: Rows, count: int, field: str) -> Tensor:
    if isinstance(rows, slice):
        rows = range(count)[rows]
    found = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows), dtype=torch.int64).reshape(-1).cpu()
    if found.numel() == 0:
        raise InputError(Problem(field, "is empty.", "Name at least one row."))
    outside = found[(found < 0) | (found >= count)].tolist()
    if outside:
        raise InputError(Problem(field, f"has {outside[0]}, the weight rows 0 to {count - 1}.", "Correct the index."))
    if found.unique().numel() != found.numel():
        raise InputError(Problem(field, "names a row twice.", "Name each once."))
    return found


def _factor(weight: Tensor, new_rows: Rows, old_rows: Rows | None) -> tuple[Tensor, float]:
    count = weight.shape[0]
    new = _indices(new_rows, count, "new_rows")
    is_new = torch.zeros(count, dtype=torch.bool).index_fill(0, new, True)
    if old_rows is None:
        if bool(is_new.all()):
            raise InputError(Problem("new_rows", "are all rows; none is left to compare with.", "Leave old rows out."))
        old = (~is_new).nonzero().squeeze(1)
    else:
        old = _indices(old_rows, count, "old_rows")
        if bool(is_new[old].any()):
            raise InputError(Problem("old_rows", "shares rows with new_rows.", "Name each on one side."))
    new, old = new.to(weight.device), old.to(weight.device)
    norms = [weight[rows].double().norm(dim=1).mean().item() for rows in (old, new)]
    for field, norm in zip(("old_rows", "new_rows"), norms, strict=True):
        if not norm > 0:
            raise InputError(Problem(field, "are all zero.", "Train or initialise them first."))
    return new, norms[0] / norms[1]
