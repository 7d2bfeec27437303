"""Grids on fewer cells: shapes, and matrices against scipy and PyTorch."""

import pytest
import torch
from scipy import fft

from tokenwise.policies.resampling import evenly, grid_within, low_pass_matrix, pooling_matrix


@pytest.mark.parametrize(
    ("grid", "count", "shape"),
    [
        ((24, 24), 576, (24, 24)),
        ((24, 24), 145, (12, 12)),
        ((24, 24), 64, (8, 8)),
        ((24, 24), 288, (16, 18)),
        ((24, 24), 1, (1, 1)),
        ((1, 9), 4, (1, 4)),
        ((12, 24), 72, (6, 12)),
        ((4, 6), 1000, (4, 6)),
    ],
)
def test_shapes(grid, count, shape):
    assert grid_within(grid, count) == shape


def test_low_pass_is_a_cut_cosine_transform():
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = low_pass_matrix(6, 4) @ values @ low_pass_matrix(9, 5).T
    whole = fft.dctn(values.numpy(), norm="ortho")
    expected = torch.from_numpy(fft.idctn(whole[:4, :5], norm="ortho")) * (4 * 5 / (6 * 9)) ** 0.5
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("matrix", [low_pass_matrix, pooling_matrix])
def test_identity_at_full_size_and_constants_stay(matrix):
    torch.testing.assert_close(matrix(7, 7), torch.eye(7, dtype=torch.float64), atol=1e-12, rtol=0)
    for cells in range(1, 8):
        torch.testing.assert_close(matrix(7, cells).sum(1), torch.ones(cells).double(), atol=1e-12, rtol=0)


def test_pooling_is_adaptive_average_pooling():
    values = torch.randn(1, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for shape in ((3, 4), (7, 9), (1, 1), (5, 10)):
        ours = pooling_matrix(7, shape[0]) @ values[0] @ pooling_matrix(10, shape[1]).T
        torch.testing.assert_close(ours, torch.nn.functional.adaptive_avg_pool2d(values, shape)[0])


def test_places_are_distinct_and_inside_their_cells():
    for length in range(1, 20):
        assert torch.equal(evenly(length, length), torch.arange(length))
        for count in range(1, length + 1):
            places = evenly(length, count)
            assert (places.diff() > 0).all()
            assert (pooling_matrix(length, count)[torch.arange(count), places] > 0).all()
