"""What matters, by what changes when it is moved a little."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def sensitivity(
    function: Callable[[Tensor], Tensor], inputs: Tensor, directions: int = 64, step: float = 0.01, seed: int = 0
) -> Tensor:
    """How far a function's value moves with its input, as a mean over random directions of length 1.

    The central difference ``|f(x + h u) - f(x - h u)| / 2h`` along each direction ``u``, the same for all tokens.

    Args:
        function: [tokens, channels] to [tokens, any], each row by itself.
        inputs: [tokens, channels], in fp32 or fp64: in a shorter type the step is lost in rounding.
        directions: how many.
        step: ``h``.
        seed: of the directions.

    Returns:
        [tokens], in the type of `inputs`.
    """
    generator = torch.Generator().manual_seed(seed)
    total = inputs.new_zeros(inputs.shape[0])
    for _ in range(directions):
        direction = torch.randn(inputs.shape[1], generator=generator, dtype=torch.float64)
        move = (direction / direction.norm() * step).to(inputs)
        total += (function(inputs + move) - function(inputs - move)).norm(dim=1)
    return total / (2 * step * directions)
