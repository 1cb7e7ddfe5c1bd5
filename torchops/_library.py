"""Loads the compiled libraries, and says plainly when they do not fit what is running."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from torchops import _cuda

HERE = Path(__file__).parent
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def load() -> None:
    """Registers torch.ops.torchops; the CUDA library only where torch has CUDA."""
    library = HERE / "libtorchops.so"
    if not library.exists():
        raise ImportError(
            f"torchops: the compiled library {library} is missing (a source folder on sys.path "
            f"hides an installed torchops, or the build did not finish). In the source folder "
            f"run:  pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(library)
        from torchops import _C
    except (OSError, ImportError) as error:
        raise ImportError(
            f"torchops: {library.name} needs torch >= 2.11 (stable ABI) and does not load under "
            f"torch {torch.__version__}: {error.__cause__ or error}\n"
            f"In the source folder run:  {REBUILD}"
        ) from error
    cuda_library = HERE / "libtorchops_cuda.so"
    if torch.version.cuda and cuda_library.exists():
        torch.ops.load_library(cuda_library)
        _cuda.available = _cuda.registered(library)
    wanted = os.environ.get("TORCHOPS_CPU_ISA")
    if wanted and wanted != _C.cpu_isa():
        _C.set_cpu_isa(wanted)
