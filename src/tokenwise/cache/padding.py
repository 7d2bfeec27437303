"""Which tokens of a batch are padding, as an attention call tells it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenwise.errors import InputError, Problem
from tokenwise.models.tap import AttentionCall


def seen_columns(call: AttentionCall) -> Tensor | None:
    """The columns that the last query of each row sees, [batch, columns], bool; None where no mask hides any.

    Raises:
        InputError: when rows are padded behind their tokens, or so that no mask tells which.
    """
    if call.padding is not None and not bool(call.padding.all()):
        raise InputError(
            Problem(
                "model",
                f"{type(call.module).__name__} is given padding in a form that does not say which tokens each query "
                "sees.",
                "Load the model with attn_implementation='sdpa', or read one row at a time.",
            )
        )
    if call.mask is None:
        return None
    last = call.mask[:, 0, -1]
    last = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    if not bool(last[:, -1].all()):
        raise InputError(
            Problem("attention_mask", "hides the last token of a row.", "Pad on the left: padding_side = 'left'.")
        )
    return last.expand(call.query.shape[0], -1)
