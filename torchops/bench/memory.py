"""Memory: an allocator that behaves the same in every sample, and the peak of one step.

By default glibc moves its thresholds while a process runs, and a large result costs page faults in
one sample and none in the next, 7 or 14 ms for the same backward. Here it stays in the state that
a long run arrives at: blocks up to 32 MiB are used again, larger ones are new, faults included, for
every contestant alike.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from torchops.bench.timing import Step

_PROC = Path("/proc/self")

# <malloc.h>; 32 MiB is the largest that glibc accepts, and where its own adjustment ends.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_REUSED = 32 << 20
_NEVER = (1 << 31) - 1


def settle_allocator() -> None:
    """Fixes glibc's thresholds for the rest of the process; nothing where there is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_REUSED)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes that `step` needs beyond what was held before it, result and scratch included.

    On a GPU this is the allocator's own peak; on Linux the peak of the resident set, which the
    kernel resets on request and which sees every allocation, oneDNN's too, to the page. None where
    the system cannot tell. The step should have run before.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _return_free_memory()
        (_PROC / "clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _return_free_memory() -> None:
    """Hands freed heap pages back, since reusing them would not show as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_PROC}/status has no {field}")
