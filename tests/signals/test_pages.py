import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.signals.pages import page_bounds, votes


def test_bounds_by_hand():
    query = torch.tensor([[1.0, -2.0]])
    pages = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, -3.0], [2.0, 2.0]]])
    assert page_bounds(query, pages.amin(1), pages.amax(1)).tolist() == [[1.0, 8.0]]
    assert (query @ pages.mT).amax(2).flatten().tolist() == [1.0, 5.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 8), st.sampled_from([0.01, 1.0, 100.0]))
def test_no_key_of_a_page_beats_its_bound(seed, page, channels, scale):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 3, 5, page, channels, generator=generator) * scale
    query = torch.randn(2, 3, 4, channels, generator=generator)
    bounds = page_bounds(query, keys.amin(3), keys.amax(3))
    true = torch.einsum("bhqc,bhpkc->bhqpk", query.double(), keys.double()).amax(4)
    assert bool((bounds >= true - 1e-5 * scale).all())
    if page == 1:
        assert torch.allclose(bounds.double(), true, atol=1e-5 * scale)


def test_every_head_has_one_vote():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 3, 9, 4, generator=generator)
    candidates = torch.rand(2, 9, generator=generator) > 0.3
    found = votes(query, keys, candidates)
    expected = torch.zeros(2, 9, dtype=torch.double)
    for row in range(2):
        for head in range(6):
            scores = keys[row, head // 2].double() @ query[row, head].double()
            expected[row] += scores.masked_fill(~candidates[row], float("-inf")).softmax(0)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.allclose(found.sum(1), torch.tensor(6.0))
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    assert torch.allclose(votes(query[:, order], keys[:, [2, 0, 1]], candidates), found, atol=1e-6)
