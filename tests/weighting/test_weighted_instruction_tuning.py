"""Weights of prompts and completions: worked numbers, and the two trainings it contains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch


def test_worked_numbers():
    tokens = TokenBatch(torch.zeros(4), torch.zeros(4), 1, completion_mask=torch.tensor([0, 0, 1, 1]))
    method = tw.WeightedInstructionTuning()
    assert method.weights(tokens).tolist() == pytest.approx([0.2, 0.2, 0.8, 0.8])
    assert method.replace(prompt_weight=0.0, completion_weight=1.0).weights(tokens).tolist() == [0, 0, 1, 1]
    assert method.reduction == "nonzero_mean"
    with pytest.raises(InputError, match=r"prompt_weight: -1 should be greater than or equal to 0"):
        tw.WeightedInstructionTuning(prompt_weight=-1)


@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.0, 1.0), (1.0, 1.0), (0.5, 0.0)])
def test_the_loss_is_divided_by_the_labels_that_weigh(weights, tiny_llama):
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.zeros(2, 12, dtype=torch.int64)
    mask[0, 5:], mask[1, 9:] = 1, 1
    prompt, completion = weights
    method = tw.WeightedInstructionTuning(prompt_weight=prompt, completion_weight=completion)
    found = tw.weighted_loss(tiny_llama, {"input_ids": ids, "labels": ids, "completion_mask": mask}, method)
    nll = F.cross_entropy(tiny_llama(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    per_token = torch.where(mask[:, 1:] == 1, completion, prompt)
    expected = (per_token * nll).sum() / per_token.count_nonzero()
    torch.testing.assert_close(found, expected)
    if weights == (0.0, 1.0):
        torch.testing.assert_close(found, tiny_llama(ids, labels=ids.where(mask == 1, -100)).loss)
    with pytest.raises(InputError, match="reads the column 'completion_mask'"):
        tw.weighted_loss(tiny_llama, {"input_ids": ids, "labels": ids}, method)
