"""Rows and column means of attention, on everything an attention call can have, and without a map of all tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenwise.models.tap import AttentionCall
from tokenwise.signals import attention


def made(queries=41, keys=41, heads=6, key_heads=6, batch=3, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, tokens):  # laid out as models lay them out: [batch, tokens, heads, channels]
        return torch.randn(batch, tokens, heads, 8, generator=generator).transpose(1, 2).to(dtype)

    return AttentionCall(
        torch.nn.Identity(), 2 * draw(heads, queries), draw(key_heads, keys), draw(key_heads, keys), **options
    )


def whole(call):
    """The softmax of all queries in fp64, written out."""
    shared = call.query.shape[1] // call.key.shape[1]
    scores = call.query.double() @ call.key.double().repeat_interleave(shared, 1).transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, float("-inf")) if call.mask.dtype == torch.bool else scores + call.mask
    distance = torch.arange(scores.shape[2])[:, None] - torch.arange(scores.shape[3])
    if call.mask is None and call.causal:
        scores = scores.masked_fill(distance < 0, float("-inf"))
    if call.mask is None and call.window is not None:
        scores = scores.masked_fill(distance >= call.window, float("-inf"))
    if call.key_bias is not None:
        scores = scores + call.key_bias
    if call.sinks is None:
        return scores.softmax(-1)
    sinks = call.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], 3).softmax(-1)[..., :-1]


def random_mask(*shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[..., 0] = True
    return mask


SINKS = torch.tensor([-3.0, 0.0, 0.5, 2.0, 5.0, 90.0])
CALLS = {
    "plain": {"mask": None},
    "causal": {"mask": None, "causal": True},
    "window": {"mask": None, "causal": True, "window": 7},
    "softcap": {"mask": None, "softcap": 2.0},
    "keys hidden": {"mask": random_mask(3, 1, 1, 41)},
    "mask of bool": {"mask": random_mask(3, 1, 41, 41)},
    "mask of all sequences": {"mask": random_mask(1, 1, 41, 41)},
    "mask by head": {"mask": torch.randn(1, 6, 41, 41, generator=torch.Generator().manual_seed(2))},
    "grouped queries": {"mask": random_mask(3, 6, 41, 41), "key_heads": 2},
    "half": {"mask": None, "dtype": torch.bfloat16},
    "sinks": {"mask": None, "causal": True, "sinks": SINKS},
    "sinks of grouped queries": {"mask": random_mask(3, 6, 41, 41), "key_heads": 2, "softcap": 2.0, "sinks": SINKS},
    "sinks in half": {"mask": None, "dtype": torch.bfloat16, "sinks": SINKS.bfloat16()},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cached", [None, 4096])
def test_rows_and_columns_are_those_of_the_whole_map(name, biased, cached, monkeypatch):
    if cached is not None:  # many blocks, of one head each
        monkeypatch.setattr("tokenwise.signals.attention._CACHED_BYTES", cached)
    call = made(scaling=0.3, **CALLS[name])
    if biased:
        call.add_key_bias(torch.linspace(-1, 1, 41).expand(3, -1))
    expected = whole(call).float()
    shared, own = torch.tensor([0, 40, 7]), torch.tensor([[0, 1], [5, 5], [40, 2]])
    torch.testing.assert_close(call.rows(shared), expected[:, :, shared], atol=2e-6, rtol=0)
    by_sequence = torch.stack([expected[index, :, own[index]] for index in range(3)])
    torch.testing.assert_close(call.rows(own), by_sequence, atol=2e-6, rtol=0)
    torch.testing.assert_close(call.columns(), expected.mean(2), atol=2e-6, rtol=0)
    valid = random_mask(3, 41)
    counted = (expected * valid[:, None, :, None]).sum(2) / valid.sum(1)[:, None, None]
    torch.testing.assert_close(call.columns(valid), counted, atol=2e-6, rtol=0)


def test_columns_of_one_query():
    call = made(queries=1, mask=None, scaling=1.0)
    torch.testing.assert_close(call.columns(), whole(call).float()[:, :, 0], atol=2e-6, rtol=0)


class _Largest(TorchDispatchMode):
    """The most elements that any operator gave in one new tensor."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 1000}, {"key_heads": 1}], ids=str)
def test_no_map_of_all_tokens_is_made(options):
    tokens = 4096
    call = made(
        queries=tokens, keys=tokens, heads=2, batch=1, **{"mask": None, "scaling": 0.3, "key_heads": 2, **options}
    )
    with _Largest() as plain:
        torch.randn(tokens, 300)
    assert plain.elements == tokens * 300  # it sees what is made
    with _Largest() as seen:
        call.rows(torch.arange(4))
        assert seen.elements <= tokens * 64
        call.columns()
    assert seen.elements <= tokens * 256


def test_a_mask_of_the_model_is_not_copied_whole():
    tokens = 2048
    call = made(
        queries=tokens, keys=tokens, heads=2, key_heads=2, batch=1, mask=random_mask(1, 1, tokens, tokens), scaling=0.3
    )
    with _Largest() as seen:
        call.columns()
    assert seen.elements <= tokens * tokens // 2


TRIANGLE = torch.ones(200, 200, dtype=torch.bool).tril()
FAR = TRIANGLE.clone()
FAR[3, 190] = True
FIRST = torch.zeros(200, 200, dtype=torch.bool)
FIRST[:, 0] = True
READ = {
    "causal": ({"mask": None, "causal": True}, [64, 128, 192, 200]),
    "triangle": ({"mask": TRIANGLE[None, None]}, [64, 128, 192, 200]),
    "added": ({"mask": torch.zeros(1, 1, 200, 200).masked_fill(~TRIANGLE, -3e38)}, [64, 128, 192, 200]),
    "one sees further": ({"mask": FAR[None, None]}, [191, 128, 192, 200]),
    "the first alone": ({"mask": FIRST[None, None]}, [1, 1, 1, 1]),
    "plain": ({"mask": None}, [200] * 4),
}


@pytest.mark.parametrize("name", READ)
def test_keys_that_no_query_of_a_block_sees_are_not_read(name, monkeypatch):
    options, expected = READ[name]
    call = made(queries=200, keys=200, batch=1, scaling=0.3, **options)
    read, plain = [], attention._softmax_of

    def softmax(query, key, *others):
        read.append(key.shape[2])
        return plain(query, key, *others)

    monkeypatch.setattr(attention, "_softmax_of", softmax)
    monkeypatch.setattr(attention, "_CACHED_BYTES", 1)
    found = call.columns()
    torch.testing.assert_close(found, whole(call).float().mean(2), atol=2e-6, rtol=0)
    assert read[::6] == expected


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_columns_with_noise_at_a_temperature(sinks):
    call = made(scaling=0.3, mask=random_mask(3, 1, 41, 41), softcap=2.0, sinks=sinks)
    noise = torch.randn(3, 6, 41, 41, generator=torch.Generator().manual_seed(3))
    scores = 2.0 * torch.tanh(call.query.double() @ call.key.double().transpose(2, 3) * 0.3 / 2.0) + noise
    scores = scores.masked_fill(~call.mask, float("-inf"))
    if sinks is not None:  # as warm as the others, and without noise
        scores = torch.cat([scores, sinks.double().view(1, 6, 1, 1).expand(3, 6, 41, 1)], 3)
    expected = (scores / 1.7).softmax(3).mean(2).float()[..., :41]
    divisors = (-noise).exp()
    found = call.columns(
        None, 1.7, lambda positions, sequences, heads, end: divisors[sequences, heads, positions, :end]
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["plain", "sinks"])
def test_the_attention_of_one_query_is_computed_once(dtype, softcap, sinks):
    call = made(queries=1, scaling=0.3, mask=random_mask(3, 1, 1, 41), softcap=softcap, key_heads=2, sinks=sinks)
    call.query, call.key, call.value = (values.to(dtype) for values in (call.query, call.key, call.value))
    read = call.columns()
    divisors = torch.rand(3, 6, 1, 41, generator=torch.Generator().manual_seed(3)) + 0.1

    def noise(positions, sequences, heads, end):
        return divisors[sequences, heads, positions, :end].clone()

    noisy = call.columns(torch.tensor([[True], [False], [True]]), 1.7, noise)
    call.compute()
    expected = (read.unsqueeze(2) @ call.value.float().repeat_interleave(3, 1)).transpose(1, 2)
    torch.testing.assert_close(call.answer.float(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)
    torch.testing.assert_close(call.columns(), read, atol=1e-6, rtol=0)
    torch.testing.assert_close(call.columns(torch.tensor([[True], [False], [True]]), 1.7, noise), noisy)
    assert not noisy[1].any()


@pytest.mark.parametrize("name", ["causal", "grouped queries", "sinks", "sinks of grouped queries"])
def test_the_whole_map_and_the_rank_along_it(name):
    call = made(scaling=0.3, **CALLS[name])
    expected = whole(call)
    torch.testing.assert_close(call.whole_map(), expected.float(), atol=2e-6, rtol=0)
    rank = torch.full((3, 6, 1, 41), 1 / 41, dtype=torch.float64) @ expected @ expected
    torch.testing.assert_close(call.rank(2), rank.squeeze(2).float(), atol=2e-6, rtol=0)
    assert bool((rank.sum(3) < 0.99).any()) == (call.sinks is not None)


def test_a_row_that_sees_nothing_but_its_sink_looks_at_nothing():
    hidden = torch.zeros(3, 1, 41, 41, dtype=torch.bool)
    call = made(scaling=0.3, mask=hidden, sinks=SINKS)
    assert not call.rows(torch.tensor([0, 5])).any()
    assert not call.columns().any()


def test_sinks_are_read_with_their_gradient():
    sinks = SINKS[:5].repeat(2)[:6].requires_grad_()
    call = made(scaling=0.3, mask=None, causal=True, sinks=sinks)
    with attention.with_gradient():
        found = torch.autograd.grad(call.columns()[..., 3].sum(), sinks)[0]
    expected = torch.autograd.grad(whole(call).mean(2)[..., 3].sum(), sinks)[0]
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    assert not call.columns().requires_grad
