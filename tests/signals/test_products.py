import pytest
import torch

from tokenwise.models.flops import FlopMeter
from tokenwise.signals.products import SumOfProducts, multiply

KINDS = [
    pytest.param(torch.float32, True, id="fp32, oneDNN"),
    pytest.param(torch.float32, False, id="fp32, PyTorch's own"),
    pytest.param(torch.float64, True, id="fp64"),
    pytest.param(torch.bfloat16, True, id="bf16"),
]


def factors(rows, inner, columns, dtype):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64).to(dtype)
    right = torch.randn(columns, inner, generator=generator, dtype=torch.float64).to(dtype)
    return left, right


def use_onednn(monkeypatch, wanted):
    if not wanted:
        monkeypatch.setattr("tokenwise.signals.products._onednn", lambda: False)


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(("dtype", "onednn"), KINDS)
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
def test_a_product_is_that_of_fp64_whatever_the_layout(dtype, onednn, layout, monkeypatch):
    left, right = factors(40, 24, 33, dtype)
    expected = left.double() @ right.double().t()
    if layout == "columns":
        right = right.t().contiguous().t()
    elif layout == "neither":
        right = right.repeat_interleave(2, 1)[:, ::2]
        left = left.repeat_interleave(2, 0)[::2]
    out = torch.empty(40, 33, dtype=wide(dtype))
    use_onednn(monkeypatch, onednn)
    for target in (None, out):
        product = multiply(left, right, wide(dtype), out=target)
        assert product.dtype == wide(dtype)
        rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(product.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(("dtype", "onednn"), KINDS)
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("rows", [7, 300])
def test_a_sum_over_tiles_is_the_product_of_the_whole(dtype, onednn, low_memory, rows, monkeypatch):
    use_onednn(monkeypatch, onednn)
    left, right = factors(600, 24, 600, dtype)
    total = SumOfProducts(24, 24, rows=rows, dtype=wide(dtype), device=left.device, low_memory=low_memory)
    for tile, other in zip(left.split(rows), right.split(rows), strict=True):
        total.add(tile, other)
    found = total.total()
    assert found.is_contiguous()
    # The sum is wider than bf16 factors, whose products are exact in it.
    torch.testing.assert_close(found.double(), left.double().t() @ right.double(), rtol=1e-4, atol=1e-4)


def test_the_columns_of_a_wide_sum_are_taken_part_by_part(monkeypatch):
    monkeypatch.setattr("tokenwise.signals.products._COLUMNS_AT_ONCE", 8)
    left, right = factors(300, 21, 300, torch.float32)
    total = SumOfProducts(21, 21, rows=300, dtype=torch.float32, device=left.device)
    total.add(left, right)
    torch.testing.assert_close(total.total(), left.t() @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [7, 300])
def test_a_sum_of_nothing_is_zero(rows):
    total = SumOfProducts(5, 3, rows=rows, dtype=torch.float32, device=torch.device("cpu")).total()
    assert torch.equal(total, torch.zeros(5, 3))


@pytest.mark.parametrize("onednn", [True, False])
def test_the_meter_counts_the_product_whoever_makes_it(onednn, monkeypatch):
    use_onednn(monkeypatch, onednn)
    left, right = factors(40, 24, 33, torch.float32)
    with FlopMeter() as meter:
        multiply(left, right, torch.float32)
    assert meter.flops == 2 * 40 * 24 * 33
