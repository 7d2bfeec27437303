"""Values after the output projection, against loops."""

import torch

from tokenwise.signals.projected_values import projected_value_norms


def test_norms_are_means_over_the_heads_that_read_a_value():
    torch.manual_seed(0)
    values = torch.randn(2, 2, 1100, 3, dtype=torch.double)
    projection = torch.randn(6 * 3, 5, dtype=torch.double)
    found = projected_value_norms(values, projection)
    expected = torch.zeros(2, 2, 1100, dtype=torch.double)
    for head in range(6):
        part = projection[head * 3 : head * 3 + 3]
        expected[:, head // 3] += (values[:, head // 3] @ part).abs().sum(2) / 3
    assert torch.allclose(found, expected)
    half = projected_value_norms(values.bfloat16(), projection)
    assert half.dtype == torch.float32
    assert float((half - expected).abs().max() / expected.max()) < 0.02
