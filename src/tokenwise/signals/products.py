"""Matrix products in the fastest way the machine has, with sums wider than bf16 factors."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

_ROWS_WORTH_REORDERING = 256
"""From this many terms on, oneDNN's sum of outer products gains more than its reordering of the factor costs."""

_COLUMNS_AT_ONCE = 4096


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``left @ right.T`` in `dtype`, which may be wider than the factors' own type.

    Args:
        left: [rows, inner].
        right: [columns, inner], of any strides.
        dtype: the type of the result: that of the factors, or fp32 for bf16 and fp16 factors.
        out: where the result may be written, [rows, columns] of type `dtype`; use what is returned, which is another
            tensor where the fastest product allocates its own.
    """
    if _onednn_serves(left):
        # Other strides would send oneDNN to its reference code, a thousand times slower.
        if not (right.is_contiguous() or right.t().is_contiguous()):
            right = right.contiguous()
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left.contiguous(), right, None, "none", [], "")
        return product
    if left.dtype == dtype:
        return torch.mm(left, right.t(), out=out)
    if left.is_cuda:
        return torch.mm(left, right.t(), out_dtype=dtype, out=out)
    product = left @ right.t()
    return product.to(dtype) if out is None else out.copy_(product)


class SumOfProducts:
    """Accumulates ``sum over tiles of left.T @ right`` [columns, inner] without a pass of zeros.

    Args:
        columns: columns of each `left`.
        inner: columns of each `right`.
        rows: rows of the largest tile.
        dtype: type of the sum: that of the factors, or fp32 for bf16 and fp16 factors.
        device: where.
        low_memory: never hold a second copy of the sum, even where that would be faster.
    """

    def __init__(
        self,
        columns: int,
        inner: int,
        *,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        low_memory: bool = False,
    ) -> None:
        # oneDNN wants the tile as the second factor, and so gives the transposed sum, to be copied in the end.
        probe = torch.empty(0, dtype=dtype, device=device)
        self._transposed = not low_memory and rows >= _ROWS_WORTH_REORDERING and _onednn_serves(probe)
        self._sum = torch.empty((inner, columns) if self._transposed else (columns, inner), dtype=dtype, device=device)
        self._empty = True

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add ``left.T @ right``: left [rows, columns], right [rows, inner]."""
        total, dtype = self._sum, self._sum.dtype
        if self._transposed:
            factor = right.to(dtype).t().contiguous()
            # Part by part, since every product is a new tensor; small ones stay in the cache and reuse their memory.
            parts = zip(left.to(dtype).split(_COLUMNS_AT_ONCE, 1), total.split(_COLUMNS_AT_ONCE, 1), strict=True)
            for columns, sums in parts:
                product = multiply(factor, columns.contiguous().t(), dtype)
                sums.copy_(product) if self._empty else sums.add_(product)
        elif left.dtype == dtype or not left.is_cuda:
            # CPU has no product of bf16 factors into fp32; rounding each tile's product to bf16 would bias the sum.
            torch.addmm(total, left.to(dtype).t(), right.to(dtype), beta=0 if self._empty else 1, out=total)
        elif self._empty:
            torch.mm(left.t(), right, out_dtype=dtype, out=total)
        else:
            torch.addmm(total, left.t(), right, out_dtype=dtype, out=total)
        self._empty = False

    def total(self) -> Tensor:
        """The sum, [columns, inner], contiguous; zeros where nothing was added. Call it once, at the end."""
        if self._empty:
            self._sum.zero_()
        return self._sum.t().contiguous() if self._transposed else self._sum


def _onednn_serves(factor: Tensor) -> bool:
    """Whether oneDNN multiplies this type here: PyTorch's own choice for fp32, MKL, has no AVX-512 code for AMD."""
    return factor.dtype == torch.float32 and factor.device.type == "cpu" and _onednn()


@functools.cache
def _onednn() -> bool:
    return (
        platform.machine().lower() in {"x86_64", "amd64"}
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
