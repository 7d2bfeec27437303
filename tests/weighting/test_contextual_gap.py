"""The gap between losses with and without a context, against the model run on the shortened text."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import LlamaForCausalLM

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.weighting.base import TokenBatch
from tokenwise.weighting.contextual_gap import ContextualGap, LimitedContext


def losses_of(model, ids):
    with torch.no_grad():
        return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")


def test_worked_weights():
    nll, without = [1.0, 2.0, 0.5, 3.0, 1.0, 1.0], [3.0, 1.0, 9.0, 3.0, 0.5, 1.0]
    batch = TokenBatch(
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 0, 0, 0, 1, 1]),
        2,
        nll=torch.tensor(nll),
        reference_nll=torch.tensor(without),
    )
    # Gaps 2, -1, 8.5 and 0, clipped to 2, 0, 5, 0 with mean 1.75; no gap at all in the second sequence.
    found = ContextualGap(without="column").weights(batch)
    torch.testing.assert_close(found, torch.tensor([2 / 1.75, 0, 5 / 1.75, 0, 1, 1]))
    lower = ContextualGap(without="column", ceiling=2).weights(batch)
    torch.testing.assert_close(lower, torch.tensor([2.0, 0, 2, 0, 1, 1]))


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_llama):
    tiny_llama.set_attn_implementation(request.param)
    return tiny_llama.eval()


def labelled_rows(labels):
    """Positions that predict a label, and these labels."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    rows = (shifted != -100).nonzero().squeeze(1)
    return rows, shifted[rows]


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_without_the_prompt_equals_the_text_without_it(model, layout):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 64, (length,), generator=generator) for length in (12, 9)]
    prompts = (5, 3)
    # The last token of the prompt stays: the first label is predicted from it.
    expected = torch.cat([losses_of(model, ids[p - 1 :]) for ids, p in zip(texts, prompts, strict=True)])
    labels = [torch.where(torch.arange(len(t)) < p, -100, t) for t, p in zip(texts, prompts, strict=True)]
    if layout == "packed":
        inputs = {
            "input_ids": torch.cat(texts)[None],
            "position_ids": torch.cat([torch.arange(len(t)) for t in texts])[None],
        }
        labels = torch.cat(labels)[None]
    else:
        size = (0, 3) if layout == "right" else (3, 0)
        inputs = {
            "input_ids": torch.stack([texts[0], F.pad(texts[1], size)]),
            "attention_mask": torch.stack([torch.ones(12), F.pad(torch.ones(9), size)]).long(),
        }
        labels = torch.stack([labels[0], F.pad(labels[1], size, value=-100)])
    found = LimitedContext(model).nll(*labelled_rows(labels), **inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    whole = torch.cat([losses_of(model, ids)[p - 1 :] for ids, p in zip(texts, prompts, strict=True)])
    assert (found - whole).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_blocks_equal_the_text_cut_into_blocks(model, layout):
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 64, (length,), generator=generator) for length in (11, 6)]

    def in_blocks(ids):
        parts = [ids[start : start + 5] for start in range(0, len(ids) - 1, 4)]
        return torch.cat([losses_of(model, part) for part in parts])

    expected = torch.cat([in_blocks(ids) for ids in texts])
    if layout == "packed":
        positions = torch.cat([torch.arange(len(t)) for t in texts])
        inputs = {"input_ids": torch.cat(texts)[None], "position_ids": positions[None]}
        labels = torch.cat([texts[0], torch.tensor([-100]), texts[1][1:]])[None]
    else:
        size = (0, 5) if layout == "right" else (5, 0)
        inputs = {
            "input_ids": torch.stack([texts[0], F.pad(texts[1], size)]),
            "attention_mask": torch.stack([torch.ones(11), F.pad(torch.ones(6), size)]).long(),
        }
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if layout == "left":
            labels[1, 5] = -100
    found = LimitedContext(model, block_size=4).nll(*labelled_rows(labels), **inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_step_trains_on_what_the_prompt_explains(tiny_llama):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 64, (2, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    plain = copy.deepcopy(tiny_llama)
    with_prompt = torch.stack([losses_of(plain, row)[3:] for row in ids])
    without = torch.stack([losses_of(plain, row[3:]) for row in ids])
    gaps = (without - with_prompt).clamp(0, 5)
    expected = (gaps / gaps.mean(1, keepdim=True) * with_prompt).mean()
    tiny_llama.train()
    with tw.weigh(tiny_llama, ContextualGap()):
        torch.testing.assert_close(tiny_llama(input_ids=ids, labels=labels).loss, expected, atol=1e-4, rtol=0)
    loss = tw.weighted_loss(tiny_llama, {"input_ids": ids, "labels": labels}, ContextualGap())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    column = torch.zeros(2, 10)
    column[:, 4:] = without
    given = {"input_ids": ids, "labels": labels, "reference_nll": column}
    loss = tw.weighted_loss(tiny_llama, given, ContextualGap(without="column"))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    assert tiny_llama.training


def test_what_cannot_be_masked_is_refused(tiny_llama):
    for wrong in ({"without": "blocks"}, {"without": "prompt", "block_size": 4}):
        with pytest.raises(InputError, match="block_size exactly where"):
            ContextualGap(**wrong)
    config = copy.deepcopy(tiny_llama.config)
    flex = LlamaForCausalLM(config)
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="'flex_attention' takes no mask"):
        ContextualGap().open_reference(flex, None)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    mamba.config._attn_implementation = "sdpa"
    with pytest.raises(InputError, match="does not take a mask for each pair"):
        ContextualGap().open_reference(mamba, None)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    sliding = transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=64, num_hidden_layers=1, sliding_window=8, **sizes)
    )
    reference = ContextualGap().open_reference(sliding, None)
    ids = torch.arange(9)[None]
    with pytest.raises(InputError, match="sliding window of 8 tokens, the batch 9"):
        reference.nll(torch.tensor([3]), torch.tensor([4]), input_ids=ids)
