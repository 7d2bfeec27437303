"""Noise by position: the right distribution, independent, and the same however it is asked for."""

import torch

from tokenwise.signals.gumbel import exponential_noise, lane_bits


def gumbel_noise(seed, lanes, queries, keys):
    found = exponential_noise(lane_bits(seed, lanes), queries, keys)
    assert bool((found > 0).all())
    return -found.log()


def noise(seed=0, lanes=2, queries=300, keys=400):
    return gumbel_noise(seed, torch.arange(lanes).view(-1, 1, 1), torch.arange(queries).view(-1, 1), torch.arange(keys))


def test_it_has_the_moments_of_the_gumbel_distribution():
    found = noise().double()
    assert found.shape == (2, 300, 400)
    assert found.isfinite().all()
    assert abs(float(found.mean()) - 0.577216) < 0.01
    assert abs(float(found.var()) - 1.644934) < 0.03
    below = (-(-found).exp()).exp()
    # The distribution function of what is drawn from it is even: 240000 numbers, 4 standard deviations.
    counts = below.flatten().histc(20, 0, 1) / below.numel()
    assert float((counts - 0.05).abs().max()) < 4 * (0.05 * 0.95 / below.numel()) ** 0.5


def test_neighbours_lanes_and_seeds_have_nothing_to_do_with_each_other():
    found = noise().double()
    pairs = [
        (found[0], found[1]),
        (found[:, 1:], found[:, :-1]),
        (found[..., 1:], found[..., :-1]),
        (found[:, 1:, 1:], found[:, :-1, :-1]),
        (found[:, 1:, :-1], found[:, :-1, 1:]),
        (found[0], noise(1).double()[0]),
        (found[0, :, :300], found[0, :, :300].T),
    ]
    for one, other in pairs:
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.015


def test_no_pattern_runs_through_rows_and_columns():
    # The largest singular value of 1000 x 1000 independent numbers is 2 * sqrt(1000), nearly.
    found = noise(lanes=1, queries=1000, keys=1000)[0].double()
    values = torch.linalg.svdvals((found - found.mean()) / found.std())
    assert float(values[0]) < 2.04 * 1000**0.5


def test_each_number_depends_on_its_own_place_alone():
    whole = noise()
    part = gumbel_noise(0, torch.tensor([1]), torch.tensor([[17], [250]]), torch.tensor([399, 3]))
    assert torch.equal(part, whole[1, [17, 250]][:, [399, 3]])
    assert torch.equal(whole, noise())
    # Where the largest number there is stands, and the smallest.
    ends = gumbel_noise(0, torch.tensor(0), torch.tensor([1920, 1156]), torch.tensor([942, 5687]))
    assert torch.allclose(ends, torch.tensor([16.635532, -2.811541]))
    # Numbers of one machine are those of all: pinned.
    expected = torch.tensor([-0.5901644, -0.5142176, -0.9277633, -1.3300366])  # from whole numbers of Python
    assert float((whole[1, 5, :4] - expected).abs().max()) < 1e-5
