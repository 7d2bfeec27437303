"""Peak memory of this process: the allocator's on CUDA, the process's own high-water mark on Linux."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The highest use of memory while it was running, in bytes; can be paused.

    On CUDA this is what the allocator had handed out on `device`; on a Linux CPU the resident memory of the whole
    process, interpreter and libraries included. Elsewhere, or where the kernel refuses to reset its mark, nothing can
    be measured and `peak` stays None.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._running = False
        self.peak: int | None = None

    def resume(self) -> None:
        """Start measuring (again): forget what was used since `pause`."""
        self._running = self._reset()

    def pause(self) -> None:
        """Stop measuring and keep the highest value seen so far in `peak`."""
        if self._running:
            used = self._read()
            self.peak = max(self.peak or 0, used) if used is not None else self.peak
        self._running = False

    def _reset(self) -> bool:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        if self._device.type != "cpu":
            return False
        try:
            _CLEAR.write_text("5")  # proc(5): resets the peak resident set size to the current one
        except OSError:
            return False
        return True

    def _read(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
