import sys

import pytest
import torch

from tokenwise.comparison import memory
from tokenwise.comparison.memory import PeakMemory

MB = 1_000_000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def use(size):
    torch.ones(size, dtype=torch.uint8)  # written to, so that it becomes resident; freed at once


def peak_of(work):
    meter = PeakMemory()
    meter.resume()
    work()
    meter.pause()
    if meter.peak is None:
        pytest.skip("the kernel does not let this process reset its high-water mark")
    return meter.peak


@linux
def test_an_allocation_shows_and_a_later_reset_forgets_it():
    before = peak_of(lambda: None)
    with_allocation = peak_of(lambda: use(200 * MB))
    after = peak_of(lambda: None)
    assert 195 * MB < with_allocation - before < 260 * MB
    assert after < before + 50 * MB


@linux
def test_what_happens_during_a_pause_does_not_count():
    meter = PeakMemory()
    meter.resume()
    meter.pause()
    if meter.peak is None:
        pytest.skip("the kernel does not let this process reset its high-water mark")
    before = meter.peak
    use(200 * MB)
    meter.resume()
    meter.pause()
    assert meter.peak < before + 50 * MB


def test_where_the_reset_is_refused_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no_such_folder" / "clear_refs")
    meter = PeakMemory()
    meter.resume()
    use(MB)
    meter.pause()
    assert meter.peak is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_allocator_is_asked():
    meter = PeakMemory("cuda")
    meter.resume()
    torch.ones(200 * MB, dtype=torch.uint8, device="cuda")
    meter.pause()
    assert meter.peak >= 200 * MB
