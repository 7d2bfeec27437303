"""Small models made on the spot."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest


@pytest.fixture(scope="session")
def _tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tiny_llama(_tiny_llama):
    """A two-layer Llama with 64 tokens, a copy for every test."""
    return copy.deepcopy(_tiny_llama)


@pytest.fixture(scope="session")
def reference_directory(_tiny_llama, tmp_path_factory):
    """Another model of the same shape, saved."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("reference")
    LlamaForCausalLM(_tiny_llama.config).save_pretrained(directory)
    return str(directory)
