"""Functions for diffusion transformers."""

import json
from pathlib import Path

import pytest
import torch

from tokenwise.reduction.diffusion import dense_tokens, density, push_apart, sparse_tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/negtome.json").read_text())


def test_pushing_apart_is_the_official_one_where_matches_are_mutual():
    hidden = torch.tensor(GOLDEN["hidden"])
    found, official = push_apart(hidden), torch.tensor(GOLDEN["output"])
    assert torch.allclose(found[:2], official[:2], atol=1e-5)
    assert torch.allclose(found[0], hidden[0], atol=1e-6)
    assert not torch.allclose(found[1], hidden[1], atol=1e-2)


def test_pushing_apart_follows_the_formula():
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 2, dtype=torch.float64)
    found = push_apart(hidden, alpha=0.5, threshold=0.3)
    for image in range(3):
        for token in range(5):
            x = hidden[image, token]
            cosines = [float(torch.cosine_similarity(x, other, 0)) for other in hidden[0]]
            best = max(range(5), key=cosines.__getitem__)
            expected = 1.5 * x - 0.5 * hidden[0, best] if cosines[best] > 0.3 else x
            assert torch.allclose(found[image, token], expected)
    assert torch.equal(push_apart(hidden, threshold=1.0)[1:], hidden[1:])


def test_density_rises_towards_the_image():
    assert density(1.0, 0.2, 0.8) == pytest.approx(0.2)
    assert density(0.0, 0.2, 0.8) == pytest.approx(0.8)
    assert density(0.5, 0.2, 0.8) == pytest.approx(0.5)


def test_sparse_and_dense_tokens():
    hidden = torch.arange(16.0).view(1, 16, 1)
    sparse = sparse_tokens(hidden, 2, 2)
    assert sparse.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(sparse_tokens(hidden, 4, 4), hidden)
    dense = dense_tokens(sparse, 2, 2, 4)
    assert dense.shape == hidden.shape
    assert dense.mean() == pytest.approx(float(hidden.mean()))
    assert torch.equal(dense_tokens(hidden, 4, 4, 4), hidden)
