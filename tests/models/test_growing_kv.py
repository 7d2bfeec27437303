"""The layer with room: as the stock one, without copying it at every token."""

import torch
from transformers.cache_utils import DynamicLayer

from tokenwise.models.growing_kv import GrowingLayer


def states(tokens, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 4, generator=generator), torch.randn(batch, 3, tokens, 5, generator=generator)


def both(*sizes):
    layers = GrowingLayer(), DynamicLayer()
    for seed, tokens in enumerate(sizes):
        given = states(tokens, seed)
        for layer in layers:
            found = layer.update(*given)
            assert found[0] is layer.keys
    return layers


def assert_same(one, other):
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.values, other.values)
    assert one.get_seq_length() == other.get_seq_length()


def test_it_stores_what_the_stock_layer_stores():
    layer, stock = both(10, 1, 300, 1)
    assert_same(layer, stock)
    assert layer.nbytes() >= layer.token_nbytes * layer.seen == stock.keys.nbytes + stock.values.nbytes


def test_a_new_token_moves_nothing():
    layer, _ = both(160)
    where = layer.keys.data_ptr()
    for seed in range(10):
        layer.update(*states(1, seed))
    assert layer.keys.data_ptr() == where
    layer.update(*states(1))
    assert layer.keys.data_ptr() != where


def test_some_are_taken():
    layer, stock = both(10, 7)
    places = torch.tensor([[[0, 3, 16]], [[1, 2, 12]]])
    keys, values = layer.take(places)
    index = places.expand(-1, 3, -1).unsqueeze(3)
    assert torch.equal(keys, stock.keys.gather(2, index.expand(-1, -1, -1, 4)))
    assert torch.equal(values, stock.values.gather(2, index.expand(-1, -1, -1, 5)))
    own = torch.stack([torch.tensor([[0, 1], [2, 3], [4, 16]])] * 2)
    assert torch.equal(layer.take(own)[0], stock.keys.gather(2, own.unsqueeze(3).expand(-1, -1, -1, 4)))


def test_rows_follow_beams_and_tokens_are_taken_back():
    layer, stock = both(10, 1)
    layer.pads, layer.notes = torch.tensor([0, 4]), {"seen": torch.tensor([[1.0], [2.0]])}
    for change in (
        lambda one: one.reorder_cache(torch.tensor([1, 0])),
        lambda one: one.batch_repeat_interleave(3),
        lambda one: one.batch_select_indices(torch.tensor([0, 4, 5])),
    ):
        for each in (layer, stock):
            change(each)
        assert_same(layer, stock)
    assert layer.pads.tolist() == [4, 0, 0]
    assert layer.notes["seen"].flatten().tolist() == [2, 1, 1]
    for each in (layer, stock):
        each.crop(-3)
        each.update(*states(2, 5, batch=3))
    assert_same(layer, stock)
    assert layer.notes == {}
    for each in (layer, stock):
        each.reset()
        each.update(*states(2, 6))
    assert_same(layer, stock)
    assert layer.pads is None


REAL = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1], [1] * 9, [1, 1, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
PLACES = [[0, 1, 5, 6, 2, 3, 4, 7, 8], list(range(9)), [4, 5, 6, 7, 0, 1, 2, 3, 8]]


def padded():
    layer, given = GrowingLayer(), states(9, batch=3)
    layer.update(*given)
    layer.note_padding(REAL, 9)
    return layer, given


def test_padding_between_tokens_is_put_in_front():
    layer, (keys, values) = padded()
    assert layer.pads.tolist() == [4, 0, 4]
    assert layer.order.tolist() == [row[:8] for row in PLACES]
    for row, places in enumerate(PLACES):
        assert torch.equal(layer.keys[row], keys[row][:, places])
        assert torch.equal(layer.values[row], values[row][:, places])
    layer.update(*states(2, 1, batch=3))
    assert torch.equal(layer.shown(11), torch.nn.functional.pad(REAL, (0, 2), value=True))
    places = torch.tensor([[[-1, 2, 10]], [[0, 2, 9]], [[0, 7, 8]]])
    assert layer.columns_of(places).tolist() == [[[-1, 5, 10]], [[0, 2, 9]], [[4, 3, 8]]]
    mask = torch.arange(33).view(3, 1, 1, 11)
    assert torch.equal(
        layer.mask_of_places(mask).flatten(1) % 11, torch.tensor([[*places, 9, 10] for places in PLACES])
    )
    layer.restore_order()
    assert torch.equal(layer.keys[:, :, :9], keys)
    assert layer.order is None


def test_padding_in_front_moves_nothing():
    layer, (keys, _) = GrowingLayer(), states(9)
    layer.update(keys, keys)
    where = layer.keys.data_ptr()
    layer.note_padding(torch.arange(9) >= torch.tensor([[3], [0]]), 9)
    assert layer.keys.data_ptr() == where
    assert layer.real is None
    assert layer.order is None
    places, mask = torch.tensor([[[1, 2]], [[3, 4]]]), torch.zeros(2, 1, 1, 9)
    assert layer.columns_of(places) is places
    assert layer.mask_of_places(mask) is mask


def test_more_padding_moves_tokens_again():
    layer, (keys, _) = padded()
    layer.notes = {"kept": torch.zeros(3, 1)}
    more, _ = states(3, 1, batch=3)
    layer.update(more, states(3, 1, batch=3)[1])
    real = torch.cat([REAL, torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]], dtype=torch.bool)], 1)
    layer.note_padding(real, 3)
    assert layer.pads.tolist() == [4, 2, 5]
    assert set(layer.notes) == {"kept"}
    whole = torch.cat([keys, more], 2)
    for row in range(3):
        places = [*(~real[row]).nonzero().flatten().tolist(), *real[row].nonzero().flatten().tolist()]
        assert torch.equal(layer.keys[row], whole[row][:, places])
    # A token that was read is hidden, and what is noted of places is of no use.
    real[1, 4] = False
    layer.note_padding(real, 0)
    assert layer.notes == {}
    layer.note_padding(torch.ones_like(real), 0)
    assert torch.equal(layer.keys, whole)
    assert layer.order is None


def test_the_order_follows_rows_and_what_is_taken_back():
    layer, (keys, _) = padded()
    layer.reorder_cache(torch.tensor([2, 0]))
    assert layer.pads.tolist() == [4, 4]
    assert layer.order.tolist() == [PLACES[2][:8], PLACES[0][:8]]
    layer.crop(-1)
    assert torch.equal(layer.keys[0], keys[2][:, PLACES[2][:8]])
    layer.crop(-2)
    assert layer.pads.tolist() == [2, 3]
    assert torch.equal(layer.keys[0], keys[2][:, [4, 5, 0, 1, 2, 3]])
    assert torch.equal(layer.keys[1], keys[0][:, [0, 1, 5, 2, 3, 4]])
    layer.crop(-2)
    assert layer.pads.tolist() == [0, 2]
    assert torch.equal(layer.keys, keys[[2, 0]][:, :, :4])
    assert layer.order is None
