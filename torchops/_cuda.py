"""Which kernels libtorchops_cuda.so brought, and which calls on the GPU are left to torch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

# What a family needs before a call may take it: training must not fail in its backward pass.
FAMILIES = {
    **{
        stem: (stem, f"{stem}_grad_input", f"{stem}_grad_weight")
        for stem in ("conv2d", "conv2d_depthwise", "conv2d_grouped", "conv2d_pointwise")
    },
    **{stem: (stem, f"{stem}_backward") for stem in ("avg_pool2d", "adaptive_avg_pool2d")},
    **{
        stem: (stem, f"{stem}_backward", f"{stem}_gather", f"{stem}_indices")
        for stem in ("max_pool2d", "adaptive_max_pool2d")
    },
    "batch_norm": ("batch_norm", "batch_norm_apply", "batch_norm_backward", "batch_norm_update"),
}

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "cross_correlation2d", "convolution2d", "conv1x1"})

available: frozenset[str] = frozenset()
"""Families whose kernels were loaded. Empty: no CUDA library, and calls say how to build one."""


def registered(library: Path) -> frozenset[str]:
    """Families of which every pointer torchops::cuda::<kernel> was filled in."""
    symbols = ctypes.CDLL(str(library))

    def pointer(kernel: str) -> int | None:
        return ctypes.c_void_p.in_dll(symbols, f"_ZN8torchops4cuda{len(kernel)}{kernel}E").value

    return frozenset(family for family, names in FAMILIES.items() if all(map(pointer, names)))


def family_of(name: str, *args: Any, **kwargs: Any) -> str:
    """The family of kernels that a call of the public function would take."""
    if name not in CONVOLUTIONS:
        return name.replace("1d", "2d")
    input = args[0] if args else kwargs["input"]
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    channels = input.shape[1 - weight.dim()]
    if weight.shape[1] < channels:
        return "conv2d_depthwise" if weight.shape[1] == 1 else "conv2d_grouped"
    return "conv2d_pointwise" if all(size == 1 for size in weight.shape[2:]) else "conv2d"


def missing(name: str, args: Any, kwargs: Any) -> str | None:
    """Why a call on CUDA tensors has no kernel in a library that was built, or None."""
    if not available:
        return None
    try:
        family = family_of(name, *args, **kwargs)
    except (AttributeError, IndexError, KeyError, TypeError):
        return None  # nonsense arguments: refused in native's words
    if family not in FAMILIES or family in available:
        return None
    return f"{family} on CUDA"
