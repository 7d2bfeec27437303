"""Gradients of a loss that is fused with the output head: made in the forward pass, handed out by backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenwise.signals.products import SumOfProducts, multiply


class HeadGradients:
    """Gradients of the hidden states and of the head's weight and bias, added up tile by tile.

    Args:
        wanted: which of the three are wanted.
        hidden: [positions, hidden].
        weight: [vocabulary, hidden].
        bias: [vocabulary], or None.
        rows: position of each token, [tokens], int64, rising.
        factors: `weight` in the type that products run in.
        tile: what holds the logits of the largest tile, [rows, vocabulary].
        low_memory: keep no second copy of the weight's gradient.

    Attributes:
        wanted: whether any of the three is wanted.
    """

    def __init__(
        self,
        wanted: Sequence[bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        *,
        factors: Tensor,
        tile: Tensor,
        low_memory: bool,
    ) -> None:
        needs_hidden, needs_weight, needs_bias = wanted
        self.wanted = any(wanted)
        self._rows = rows
        # Positions without a gap need no scatter.
        self._dense = rows.shape[0] == hidden.shape[0]
        self._factors = factors
        self._types = weight.dtype, None if bias is None else bias.dtype
        self._hidden = torch.zeros_like(hidden) if needs_hidden else None
        self._bias = tile.new_zeros(tile.shape[1]) if needs_bias else None
        self._weight = None
        if needs_weight:
            self._weight = SumOfProducts(
                *weight.shape, rows=tile.shape[0], dtype=tile.dtype, device=tile.device, low_memory=low_memory
            )

    def add(self, part: slice, states: Tensor, gradient: Tensor) -> None:
        """Add those of one tile.

        Args:
            part: which tokens it holds.
            states: their hidden states, [rows, hidden], in the type that products run in.
            gradient: with respect to ``states @ weight.T + bias``, [rows, vocabulary].
        """
        dtype = self._factors.dtype
        narrow = gradient.to(dtype)
        if self._hidden is not None:
            product = multiply(narrow, self._factors.t(), dtype)
            if self._dense:
                self._hidden[part] = product
            else:
                self._hidden.index_copy_(0, self._rows[part], product.to(self._hidden.dtype))
        if self._weight is not None:
            self._weight.add(narrow, states)
        if self._bias is not None:
            self._bias += gradient.sum(0)

    def totals(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of hidden states, weight and bias, None where not wanted. Call it once, at the end."""
        of_weight, of_bias = self._types
        return (
            self._hidden,
            None if self._weight is None else self._weight.total().to(of_weight),
            None if self._bias is None or of_bias is None else self._bias.to(of_bias),
        )


class MadeInForward(torch.autograd.Function):
    """A function whose forward leaves the gradients of its first three inputs in ``ctx.gradients``.

    Its backward multiplies them by the incoming scalar, once. They are no inputs or outputs, so there is no
    save_for_backward, and backward may scale them in place.
    """

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The weighted loss makes its gradients in the forward pass, so backward can run through it only once. "
                "Run the forward pass again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None or incoming is None else gradient.mul_(incoming.to(gradient.dtype))
            for gradient in gradients
        ]
        return (*scaled, *[None] * (len(ctx.needs_input_grad) - len(scaled)))
