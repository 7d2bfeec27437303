"""Counting floating-point operations, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


class FlopMeter(FlopCounterMode):
    """Counts the matrix products, convolutions and attention of everything that runs inside its ``with`` block.

    A multiply-add counts as two operations. Attention counts all query-key pairs, masked ones included, and the
    backward pass of fused attention counts the recomputed scores: this is what the kernels are written to do, and
    torch's own convention. Element-wise work (norms, activations, softmax, the optimizer) is not counted.

    torch's counter alone reports zero for fused attention on the CPU and for several in-place and vector products;
    the mapping below adds them.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_UNCOUNTED_BY_TORCH)

    @property
    def flops(self) -> int:
        """Operations counted so far."""
        return int(self.get_total_flops())


# Every formula gets the shapes of the operator's tensors in the place of the tensors.
Shape = torch.Size


def _matrix_product(left: Shape, right: Shape) -> int:
    return 2 * prod(left) * right[-1]


def _matrix_product_added(total: Shape, left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return _matrix_product(left, right)


def _linear(rows: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(rows) * weight[0]


def _integer_matrix_product(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return _matrix_product(left, right)


def _vector_product(left: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left)


def _vector_product_added(total: Shape, left: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left)


def _grouped_matrix_product(left: Shape, right: Shape, offsets: Shape | None = None, *args: Any, **kwargs: Any) -> int:
    if len(left) == len(right) == 2:  # the groups split the inner dimension
        return _matrix_product(left, right)
    if len(left) == 3 and len(right) == 2:  # the groups split the columns on the right: each meets one matrix
        return 2 * left[1] * left[2] * right[1]
    return 2 * prod(left) * right[-1]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    scores, mixing = _attention_products(query, key, value)
    return scores + mixing


def _attention_backward(
    output_gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    # The scores once more; the gradients of query and key; those of the attention weights and of the values.
    scores, mixing = _attention_products(query, key, value)
    return 3 * scores + 2 * mixing


def _attention_products(query: Shape, key: Shape, value: Shape) -> tuple[int, int]:
    """Operations of query x key and of weights x value; shapes are [batch, heads, tokens, width].

    Key and value may have fewer heads than the query: each then serves several.
    """
    pairs = query[0] * query[1] * query[2] * key[2]
    return 2 * pairs * query[3], 2 * pairs * value[3]


_UNCOUNTED_BY_TORCH: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: _matrix_product_added,
    aten.addbmm: _matrix_product_added,
    aten.addbmm_: _matrix_product_added,
    aten.baddbmm_: _matrix_product_added,
    aten._addmm_activation: _matrix_product_added,
    torch.ops.mkldnn._linear_pointwise: _linear,
    aten._int_mm: _integer_matrix_product,
    aten._grouped_mm: _grouped_matrix_product,
    aten.mv: _vector_product,
    aten.addmv: _vector_product_added,
    aten.addmv_: _vector_product_added,
    aten.dot: _vector_product,
    aten.vdot: _vector_product,
}
