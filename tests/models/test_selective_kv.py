"""A layer that stores fewer tokens than it has seen: lengths, masks, rows of the batch, bytes."""

import pytest
import torch

from tokenwise.errors import InputError
from tokenwise.models.selective_kv import SelectiveLayer


def made():
    """Ten tokens seen; of the first row three are stored, of the second two."""
    layer = SelectiveLayer()
    states = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    layer.expect(torch.tensor([[0, 4, 9], [0, 2, 9]]), 10, torch.tensor([[True, True, True], [False, True, True]]))
    layer.update(states, -states)
    return layer, states


def test_lengths_are_those_of_what_was_seen():
    layer, states = made()
    assert (layer.get_seq_length(), layer.stored, layer.get_mask_sizes(2)) == (10, 3, (12, 0))
    assert layer.nbytes() == 2 * states.numel() * 4
    keys, values = layer.update(states[:, :, :1], states[:, :, :1])
    assert keys.shape == values.shape == (2, 1, 4, 4)
    assert (layer.get_seq_length(), layer.stored) == (11, 4)
    assert layer.positions[:, 0].tolist() == [[0, 4, 9, 10], [0, 2, 9, 10]]
    assert layer.real[:, 0].tolist() == [[True] * 4, [False, True, True, True]]
    layer.reset()
    assert (layer.get_seq_length(), layer.stored, layer.nbytes()) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_the_mask_takes_the_columns_of_what_is_stored(dtype):
    layer, _ = made()
    whole = torch.zeros(1, 1, 2, 12) if dtype != torch.bool else torch.ones(1, 1, 2, 12, dtype=torch.bool)
    off = torch.finfo(dtype).min if dtype != torch.bool else False
    whole[..., 4] = off
    whole[0, 0, 0, 11] = off
    mask = layer.mask(whole, 2) == off
    assert mask[0, 0].tolist() == [[False, True, False, False, True], [False, True, False, False, False]]
    assert mask[1, 0].tolist() == [[True, False, False, False, True], [True, False, False, False, False]]


def test_without_a_mask_what_fills_up_is_hidden():
    layer, _ = made()
    assert layer.mask(None, 1)[:, 0, 0].tolist() == [[True] * 4, [False, True, True, True]]
    assert layer.mask(None, 2)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
    layer.batch_select_indices(torch.tensor([0]))
    layer.real = None
    assert layer.mask(None, 1) is None


def test_everything_follows_the_rows():
    layer, states = made()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.positions[:, 0].tolist() == [[0, 2, 9]] * 2
    assert layer.real[:, 0].tolist() == [[False, True, True]] * 2
    assert torch.equal(layer.keys, states[[1, 1]])
    layer, states = made()
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert layer.positions[:, 0].tolist() == [[0, 4, 9], [0, 2, 9]]
    assert torch.equal(layer.values, -states)


def test_taking_tokens_back_is_refused():
    layer, _ = made()
    layer.crop(0)
    with pytest.raises(InputError, match="cannot take the last ones back"):
        layer.crop(-1)


def test_one_token_is_stored_behind_the_others_without_a_copy():
    layer = SelectiveLayer()
    states = torch.randn(2, 3, 85, 4)
    layer.update(states[:, :, :80], -states[:, :, :80])
    assert layer.nbytes() == 2 * states[:, :, :80].nbytes
    places = set()
    for token in range(80, 85):
        keys, values = layer.update(states[:, :, token : token + 1], -states[:, :, token : token + 1])
        assert layer.gave(keys)
        places.add(keys.data_ptr())
    assert torch.equal(keys, states)
    assert torch.equal(values, -states)
    assert len(places) == 1
    assert layer.nbytes() == 2 * 2 * 3 * (80 + 5) * 4 * 4


def test_the_last_token_takes_the_place_of_the_one_that_is_dropped():
    layer = SelectiveLayer()
    states = torch.randn(1, 2, 6, 4)
    layer.update(states, -states)
    layer.tracks["mark"] = torch.arange(6.0).expand(1, 2, -1)
    layer.drop(torch.tensor([[[1], [5]]]))
    assert layer.positions.tolist() == [[[0, 5, 2, 3, 4], [0, 1, 2, 3, 4]]]
    assert torch.equal(layer.tracks["mark"], layer.positions.float())
    expected = torch.stack([states[0, head][layer.positions[0, head]] for head in range(2)])
    assert torch.equal(layer.keys[0], expected)
    assert torch.equal(layer.values[0], -expected)
    layer.update(states[:, :, :1], states[:, :, :1])
    assert layer.positions[0, :, -1].tolist() == [6, 6]
    assert layer.keys.shape[2] == 6


def test_gradients_pass_through_what_is_appended():
    layer = SelectiveLayer()
    states = torch.randn(1, 2, 6, 4, requires_grad=True)
    layer.update(states[:, :, :5], states[:, :, :5])
    keys, _ = layer.update(states[:, :, 5:], states[:, :, 5:])
    keys.sum().backward()
    assert torch.equal(states.grad, torch.ones_like(states))


def test_a_layer_may_store_nothing():
    layer = SelectiveLayer()
    states = torch.randn(1, 2, 3, 4)
    layer.update(states[:, :, :1], states[:, :, :1])
    layer.drop(torch.zeros(1, 1, 1, dtype=torch.int64))
    assert (layer.stored, layer.seen) == (0, 1)
    layer.reset()
    layer.update(states, states)
    for _ in range(2):
        layer.keep(torch.zeros(1, 1, 0, dtype=torch.int64))
        assert (layer.stored, layer.seen, layer.nbytes()) == (0, 3, 0)
    keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert torch.equal(keys, states[:, :, :1])


def test_the_last_tokens_are_taken_back_whatever_the_order():
    layer = SelectiveLayer()
    states = torch.randn(1, 2, 6, 4)
    layer.update(states[:, :, :5], -states[:, :, :5])
    layer.drop(torch.tensor([[[1], [2]]]))
    layer.update(states[:, :, 5:], -states[:, :, 5:])
    layer.take_back(5)
    assert (layer.seen, layer.rising) == (5, True)
    assert layer.positions.tolist() == [[[0, 2, 3, 4], [0, 1, 3, 4]]]
    expected = torch.stack([states[0, head][layer.positions[0, head]] for head in range(2)])
    assert torch.equal(layer.keys[0], expected)
