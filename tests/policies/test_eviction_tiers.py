from hypothesis import given
from hypothesis import strategies as st

from tokenwise.policies.eviction import tier_counts


@given(st.data())
def test_tiers_fit_in_the_bytes_and_leave_no_room(data):
    available = data.draw(st.integers(1, 300))
    count = data.draw(st.integers(1, available))
    share = data.draw(st.floats(0.01, 1))
    protects = data.draw(st.integers(0, count))
    packed = data.draw(st.integers(1, 60))
    whole = data.draw(st.integers(packed, 120))
    exact, stored = tier_counts(count, available, share, protects, whole, packed)
    assert protects <= exact <= stored <= available
    used = exact * whole + (stored - exact) * packed
    assert used <= count * whole
    if stored < available:
        assert exact == max(int(share * count + 0.5), protects)
        assert count * whole - used < packed
    elif exact < available and packed < whole:
        assert count * whole - used < whole - packed


def test_by_hand():
    # 10 exact tokens' bytes, half of them in a quarter of the size: 5 exact and 20 packed.
    assert tier_counts(10, 100, 0.5, 0, 8, 2) == (5, 25)
    assert tier_counts(10, 100, 0.5, 8, 8, 2) == (8, 16)
    # All 20 fit with 5 exact ones; the bytes that are left make more of them exact: 6 * 8 + 14 * 2 = 76.
    assert tier_counts(10, 20, 0.5, 0, 8, 2) == (6, 20)
