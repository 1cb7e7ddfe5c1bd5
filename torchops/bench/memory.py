"""Peak memory of one step beyond what was held before it, result and scratch included.

CUDA: the allocator's own peak. Linux: the peak of the resident set, which the kernel resets on
request (/proc/self/clear_refs); it sees every allocation, those of oneDNN and of kernels too, to
the page. Elsewhere there is no figure.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from torchops.bench.timing import Step

_PROC = Path("/proc/self")


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes, or None where the system cannot tell. The step should have run before."""
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
