"""Difference sampling: worked numbers, columns, refusals."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tokenwise.errors import InputError
from tokenwise.weighting.difference_sampling import difference_sampling, sample_by_difference

SMALL = [3.0, 3.0, 1.0, 6.0]
LARGE = [1.5, 2.8, 0.9, 5.7]


def test_what_the_large_model_gains_most_stays():
    """Easy for both (third) and noise to both (second) go."""
    assert difference_sampling(torch.tensor(SMALL), torch.tensor(LARGE)).tolist() == [True, False, False, True]
    assert difference_sampling(torch.tensor(SMALL), torch.tensor(LARGE), 0.25).tolist() == [True, False, False, False]
    assert difference_sampling(torch.tensor(SMALL), torch.tensor(LARGE), 1.0).all()
    assert difference_sampling(torch.ones(4), torch.ones(4)).tolist() == [True, True, False, False]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=20), st.floats(0.1, 1))
def test_equals_the_official_order(pairs, keep):
    """The official script sorts small - large downwards and takes the first."""
    small, large = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    mask = difference_sampling(small, large, keep)
    order = torch.sort(small - large, descending=True, stable=True).indices
    assert sorted(order[: mask.sum()].tolist()) == mask.nonzero().squeeze(1).tolist()


def test_a_data_set_with_losses_of_documents_or_of_tokens():
    documents = Dataset.from_dict({"text": list("abcd"), "small_nll": SMALL, "large_nll": LARGE})
    assert sample_by_difference(documents)["text"] == ["a", "d"]
    # The mean per token counts, not the sum: the long document gains less on each of its tokens.
    tokens = Dataset.from_dict(
        {
            "text": ["short", "long"],
            "s": [[9.0, 3.0], [0.0] + [2.0] * 9],
            "l": [[0.0, 2.0], [9.0] + [1.5] * 9],
        }
    )
    assert sample_by_difference(tokens, "s", "l")["text"] == ["short"]


def test_refusals():
    documents = Dataset.from_dict({"text": ["a"], "s": [[1.0]], "l": [[2.0]]})
    with pytest.raises(InputError, match=r"dataset.small_nll: is missing. There are text, s, l"):
        sample_by_difference(documents)
    with pytest.raises(InputError, match=r"dataset\[0\].s: has no loss"):
        sample_by_difference(documents, "s", "l")
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(3,\)"):
        difference_sampling(torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match=r"keep: 1.5 is not a share"):
        difference_sampling(torch.ones(2), torch.ones(2), 1.5)
