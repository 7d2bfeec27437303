"""Attention rows and scaling within groups, against whole maps in fp64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.policies.selection import top_ceiling
from tokenwise.signals import attention
from tokenwise.signals.scaling import min_max


def test_attention_mass_equals_the_whole_map_whatever_the_blocks(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(4, 7, 8, dtype=torch.float64), torch.randn(2, 9, 8, dtype=torch.float64)
    counted = torch.tensor([True, False, True] * 3)
    bias = torch.zeros(7, 9, dtype=torch.float64).masked_fill(torch.rand(7, 9) < 0.3, -torch.inf)
    bias[:, 0] = 0
    scores = torch.einsum("hqd,hkd->hqk", query, key.repeat_interleave(2, 0)) * 0.3
    for softcap in (None, 2.0):
        capped = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        expected = (capped + bias).softmax(-1)[..., counted].sum(-1).mean(0)
        for block in (1, 4 * 4 * 9 * 2, 2**20):
            monkeypatch.setattr(attention, "_BLOCK_BYTES", block)
            found = attention.attention_mass(query, key, counted, lambda rows: bias[rows], 0.3, softcap)
            torch.testing.assert_close(found, expected)


def test_min_max_within_groups():
    values = torch.tensor([1.0, 0.0, 2.0, -0.5, 7.0, 3.0, 3.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 3, 3])
    found = min_max(values, groups, 4)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.2, 1.0, 0.0, 0.0, 0.0, 0.0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 100))
def test_top_ceiling_keeps_exactly_the_share_rounded_up(sizes, percent):
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    kept = top_ceiling(torch.rand(sum(sizes)), percent / 100, groups)
    assert torch.bincount(groups[kept], minlength=len(sizes)).tolist() == [-(-percent * size // 100) for size in sizes]
