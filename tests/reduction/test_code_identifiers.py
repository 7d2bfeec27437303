"""Identifiers as one token: groups from offsets, means of the pieces, texts of different lengths in one batch."""

import pytest
import torch
from small_texts import batch, text

import tokenwise as tw
from tokenwise.errors import InputError
from tokenwise.reduction import identifier_groups


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).last_hidden_state


def test_groups_of_offsets():
    code = "max_len = n2 + 3.14"
    #         [CLS]   max     _       len     =        n        2         +         3         .14       [SEP]
    offsets = [(0, 0), (0, 3), (3, 4), (4, 7), (7, 9), (9, 11), (11, 12), (12, 14), (15, 16), (16, 19), (0, 0)]
    assert identifier_groups(code, offsets) == [-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, -1]
    # A token over the end of an identifier is a piece of none.
    assert identifier_groups("ab(c", [(0, 1), (1, 3), (3, 4)]) == [0, -1, 1]
    assert identifier_groups("x y", [(0, 1), (1, 3)]) == [0, 1]


def test_groups_from_a_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(["ab cd"], trainers.BpeTrainer(special_tokens=["?"], vocab_size=30))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="?")
    code = ["abc = abc", "d"]
    found = tokenizer(code, return_offsets_mapping=True, padding=True)
    groups = [identifier_groups(*pair) for pair in zip(code, found["offset_mapping"], strict=True)]
    for row, source in enumerate(code):
        for group, (start, end) in zip(groups[row], found["offset_mapping"][row], strict=True):
            assert (group >= 0) == (source[start:end].strip().isalnum())
    assert sorted(set(groups[0])) == [-1, 0, 1]
    assert groups[1] == [0] + [-1] * (len(groups[1]) - 1)


def grouped(lengths=(12, 7)):
    inputs = batch(lengths)
    groups = torch.full_like(inputs["input_ids"], -1)
    groups[0, 1:4], groups[0, 6:8] = 0, 1
    groups[1, 1:6] = 3
    return {**inputs, "token_groups": groups}


def test_the_pieces_become_their_mean():
    model, inputs = text("bert"), grouped()
    seen = {}
    with tw.reduce(model, tw.reduction.CodeIdentifiers()) as handle:
        block = model.encoder.layer[0]
        hooks = [
            block.attention.output.register_forward_hook(lambda *call: seen.update(before=call[-1])),
            block.intermediate.register_forward_pre_hook(lambda module, args: seen.update(after=args[0])),
        ]
        run(model, inputs)
        tokens = handle.last
        [hook.remove() for hook in hooks]
    before, after = seen["before"].double(), seen["after"].double()
    first = [[0], [1, 2, 3], [4], [5], [6, 7], [8], [9], [10], [11]]
    second = [[0], [1, 2, 3, 4, 5], [6]]
    for row, groups in enumerate((first, second)):
        expected = torch.stack([before[row, group].mean(0) for group in groups])
        assert torch.allclose(after[row, : len(groups)], expected, atol=1e-6)
        assert tokens.size[row, : len(groups)].tolist() == [len(group) for group in groups]
        assert tokens.positions[row, : len(groups)].tolist() == [group[0] for group in groups]
    assert tokens.padding.tolist() == [[False] * 9, [False] * 3 + [True] * 6]
    assert tokens.layers == [9, 9, 9, 9]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_filling_up_is_seen_by_nobody(kind, attention):
    # No padding comes in: the shorter text gets tokens to fill up its row.
    model, inputs = text(kind), grouped((12, 12))
    model.set_attn_implementation(attention)
    method = tw.reduction.CodeIdentifiers()
    inputs.pop("attention_mask")
    with tw.reduce(model, method) as handle:
        both, tokens = run(model, inputs), handle.last
        assert tokens.padding.sum(1).tolist() == [0, 1]
        alone = run(model, {name: value[1:] for name, value in inputs.items()})
        assert alone.shape[1] == 8
    assert torch.allclose(both[1, :8], alone[0], atol=1e-5)
    with tw.reduce(model, method, masked=True):
        slow = run(model, inputs)
    expected = slow.gather(1, tokens.positions.unsqueeze(2).expand_as(both))
    assert torch.allclose(both[~tokens.padding], expected[~tokens.padding], atol=2e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_gradients_stay_finite_where_rows_are_filled_up():
    model, inputs = text("bert").train(), grouped((12, 12))
    with tw.reduce(model, tw.reduction.CodeIdentifiers()), torch.autograd.detect_anomaly(check_nan=True):
        model(**inputs).last_hidden_state[:, 0].square().sum().backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert torch.isfinite(gradient).all()
    assert (gradient[inputs["input_ids"][0]].abs().sum(1) > 0).all()


def test_without_pieces_it_is_dense_to_the_bit():
    model, inputs = text("roberta"), batch()
    dense = run(model, inputs)
    groups = torch.arange(24).expand(3, -1)
    with tw.reduce(model, tw.reduction.CodeIdentifiers()) as handle:
        assert torch.equal(run(model, {**inputs, "token_groups": torch.full((3, 24), -1)}), dense)
        assert torch.equal(run(model, {**inputs, "token_groups": groups}), dense)
        assert handle.stats["macs_share"] == 1


def test_bad_input_is_refused():
    model, inputs = text("bert"), grouped()
    with pytest.raises(InputError, match="the identifiers decide what stays"):
        tw.reduction.CodeIdentifiers(keep=0.5)
    with tw.reduce(model, tw.reduction.CodeIdentifiers()):
        with pytest.raises(InputError, match="token_groups: is missing"):
            run(model, batch())
        wrong = {**inputs, "token_groups": inputs["token_groups"][:, :5]}
        with pytest.raises(InputError, match=r"token_groups: has the shape \(2, 5\)"):
            run(model, wrong)
