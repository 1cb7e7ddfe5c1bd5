"""The convolutions' formulas for torch.utils.flop_counter, which counts no operator without one.

They are registered when somebody imports that module: next to a torch with CUDA it loads triton,
which took 160 ms of torchops' 187 (python -X importtime -c "import torch, torchops").
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

import torch

_MODULE = "torch.utils.flop_counter"


def register(flop_counter: Any) -> None:
    count, operators = flop_counter.conv_flop_count, torch.ops.torchops

    @flop_counter.register_flop_formula([operators.conv2d, operators.conv2d_bn_act])
    def conv2d(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return count(input, weight, out_shape)

    @flop_counter.register_flop_formula(operators.conv2d_grad_input)
    def conv2d_grad_input(grad_output: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any):
        return count(grad_output, weight, out_shape, transposed=True)

    @flop_counter.register_flop_formula(operators.conv2d_grad_weight)
    def conv2d_grad_weight(input: Any, grad_output: Any, *_: Any, out_shape: Any = None, **__: Any):
        """As torch counts it: the groups of a convolution make its gradient no cheaper."""
        return count(_transposed(input), _transposed(grad_output), _transposed(out_shape))


def _transposed(shape: Any) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find the module, and registers the formulas once it has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = exec_module
        return spec


if _MODULE in sys.modules:
    register(sys.modules[_MODULE])
else:
    sys.meta_path.insert(0, _Finder())
