"""Hand-written CPU and CUDA kernels for CNN layers, as drop-ins for torch.nn."""

from torchops import _library

_library.load()

from torchops import _flops, functional, nn  # noqa: E402, F401
from torchops._backend import FallbackWarning, backend  # noqa: E402
from torchops._info import info  # noqa: E402
from torchops.convert import convert, revert  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "__version__",
    "backend",
    "convert",
    "functional",
    "info",
    "nn",
    "revert",
]
