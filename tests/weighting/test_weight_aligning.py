"""align_new_rows: the official numbers, what stays, what is undone, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tokenwise as tw
from tokenwise.errors import InputError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "class_losses.json").read_text(encoding="utf-8"))


def weight():
    return torch.tensor(GOLDEN["weight_align"]["before"], dtype=torch.float64)


def test_official_numbers_and_what_stays():
    found, before, new = weight(), weight(), slice(-GOLDEN["weight_align"]["new"], None)
    handle = tw.align_new_rows(found, new)
    torch.testing.assert_close(found, torch.tensor(GOLDEN["weight_align"]["after"], dtype=torch.float64))
    assert handle.stats["factor"] == pytest.approx(GOLDEN["weight_align"]["gamma"])
    assert found[:-3].norm(dim=1).mean().item() == pytest.approx(found[-3:].norm(dim=1).mean().item())
    assert torch.equal(found[:-3], before[:-3])
    cosine = torch.nn.functional.cosine_similarity(found, before, dim=1)
    torch.testing.assert_close(cosine, torch.ones(7, dtype=torch.float64))
    handle.undo()
    assert torch.equal(found, before)


def test_only_the_named_old_rows_are_compared():
    found = weight()
    tw.align_new_rows(found, [6, 5], old_rows=[0])
    assert found[[5, 6]].norm(dim=1).mean().item() == pytest.approx(weight()[0].norm().item())


def test_tokens_added_to_a_language_model(tiny_llama):
    tiny_llama.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        tiny_llama.lm_head.weight[64:] *= 5
    before = copy.deepcopy(tiny_llama.state_dict())
    with tw.align_new_rows(tiny_llama, range(64, 70)) as handle:
        for matrix in (tiny_llama.model.embed_tokens.weight, tiny_llama.lm_head.weight):
            norms = matrix.detach().norm(dim=1)
            assert norms[64:].mean().item() == pytest.approx(norms[:64].mean().item(), rel=1e-5)
        assert set(handle.stats) == {"factor", "factor_output"}
        assert handle.stats["factor_output"] < 0.5 < handle.stats["factor"]
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    tiny_llama.lm_head.weight = tiny_llama.model.embed_tokens.weight
    assert set(tw.align_new_rows(tiny_llama, [69]).stats) == {"factor"}


def test_classes_added_to_a_classifier():
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=5
    )
    model = BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight[4] *= 9
    ids = torch.arange(6)[None]
    before = model(ids).logits
    with tw.align_new_rows(model, [4]):
        norms = model.classifier.weight.detach().norm(dim=1)
        assert norms[4].item() == pytest.approx(norms[:4].mean().item(), rel=1e-5)
        assert torch.equal(model(ids).logits[:, :4], before[:, :4])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("rows", "old", "message"),
    [
        ([], None, "new_rows: is empty"),
        ([7], None, "new_rows: has 7, the weight rows 0 to 6"),
        ([1, 1], None, "new_rows: names a row twice"),
        (range(7), None, "new_rows: are all rows"),
        ([1], [1, 2], "old_rows: shares rows"),
        ([0], None, "new_rows: are all zero"),
    ],
)
def test_what_makes_no_sense_is_refused(rows, old, message):
    found = weight()
    found[0] = 0
    before = found.clone()
    with pytest.raises(InputError, match=message):
        tw.align_new_rows(found, rows, old)
    assert torch.equal(found, before)
    with pytest.raises(InputError, match="no transformers model"):
        tw.align_new_rows(torch.nn.Linear(2, 2), [0])
