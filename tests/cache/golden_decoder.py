"""The small decoder that golden numbers were computed with, and what it reads."""

from typing import Any

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def golden_decoder(**config: Any) -> LlamaForCausalLM:
    """Weights from NumPy's legacy generator, whose numbers are the same in every version."""
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    generator = numpy.random.RandomState(0)
    with torch.no_grad():
        for _, values in sorted(model.named_parameters()):
            drawn = torch.from_numpy(generator.standard_normal(tuple(values.shape)))
            values.copy_(1 + 0.1 * drawn if values.dim() == 1 else 0.3 * drawn)
    return model


def golden_tokens(count: int, vocabulary: int = 64) -> torch.Tensor:
    """[1, count]"""
    return torch.from_numpy(numpy.random.RandomState(1).randint(11, vocabulary, (1, count)))
