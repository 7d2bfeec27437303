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
