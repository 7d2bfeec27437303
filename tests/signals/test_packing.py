import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenwise.signals.packing import pack, packed_nbytes, unpack


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 9), st.sampled_from([8, 4]), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_channel_is_off_by_more_than_half_a_step(seed, channels, bits, scale):
    values = torch.randn(2, 3, 5, channels, generator=torch.Generator().manual_seed(seed)) * scale
    packed = pack(values, bits)
    again = unpack(packed)
    reach = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    assert again.shape == values.shape
    assert bool(((again - values).abs() <= reach / (2**bits - 1) / 2 + 1e-6 * values.abs().max()).all())
    assert packed.nbytes == 30 * packed_nbytes(channels, bits)
    # What was packed once comes through a second time unchanged.
    assert torch.allclose(unpack(pack(again, bits)), again, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_by_hand(bits):
    most = 2**bits - 1
    values = torch.tensor([[0.0, float(most), 1.4, 2.6], [7.0, 7.0, 7.0, 7.0]], dtype=torch.bfloat16)
    packed = pack(values, bits)
    assert unpack(packed).tolist() == [[0.0, float(most), 1.0, 3.0], [7.0] * 4]
    assert unpack(packed).dtype == torch.bfloat16
    assert packed.codes[0].tolist() == ([0, most, 1, 3] if bits == 8 else [most << 4, 1 | 3 << 4])
