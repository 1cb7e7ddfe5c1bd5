"""BatchNorm1d/2d/3d and SyncBatchNorm on our kernels, with activation and residual."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.fx import Proxy

from torchops.ops._activation import activation_number
from torchops.ops.batch_norm import batch_norm, native_ending


def call_statistics(module: Any) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """running_mean, running_var, training and momentum of this call; counts the batch."""
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats:
        batches = module.num_batches_tracked
        if batches is not None:
            batches.add_(1)
            if module.momentum is None:  # cumulative average
                momentum = 1.0 / float(batches)
    mean, var = module.running_mean, module.running_var
    if not module.training:
        return mean, var, mean is None and var is None, momentum
    return (
        (mean, var, True, momentum) if module.track_running_stats else (None, None, True, momentum)
    )


def normalize(
    module: Any, input: Tensor, activation: str | None, residual: Tensor | None = None
) -> Tensor:
    """activation(module(input) + residual) for one of torch's batch-norms, in one pass."""
    module._check_input_dim(input)
    mean, var, training, momentum = call_statistics(module)
    return batch_norm(
        input, mean, var, module.weight, module.bias, training, momentum, module.eps,
        activation=activation, residual=residual,
    )  # fmt: skip


def _recorded(module: Any, input: Proxy, residual: Any) -> Any:
    """One call of the module in torch.fx's graph, as of torch.nn's: it counts, and has a mode."""
    arguments = (input,) if residual is None else (input, residual)
    target = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", target, arguments, {})


class _Fused:
    """What is added to torch's modules: an activation, and a residual to add before it."""

    activation: str | None = None

    def __init__(
        self,
        *args: Any,
        activation: str | None = None,
        device: Any = None,  # named here: torch.nn.utils.skip_init looks for it
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        activation_number(activation)
        for name, value in (("device", device), ("dtype", dtype)):
            if value is not None:
                kwargs[name] = value
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return _recorded(self, input, residual)
        return normalize(self, input, self.activation, residual)

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    __doc__ = nn.BatchNorm1d.__doc__


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    __doc__ = nn.BatchNorm2d.__doc__


class BatchNorm3d(_Fused, nn.BatchNorm3d):
    __doc__ = nn.BatchNorm3d.__doc__


class _LazyFused(_Fused):
    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        super().initialize_parameters(input)  # type: ignore[misc]


class LazyBatchNorm1d(_LazyFused, nn.LazyBatchNorm1d):
    __doc__ = nn.LazyBatchNorm1d.__doc__
    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_LazyFused, nn.LazyBatchNorm2d):
    __doc__ = nn.LazyBatchNorm2d.__doc__
    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_LazyFused, nn.LazyBatchNorm3d):
    __doc__ = nn.LazyBatchNorm3d.__doc__
    cls_to_become = BatchNorm3d  # type: ignore[assignment]


class SyncBatchNorm(_Fused, nn.SyncBatchNorm):
    __doc__ = nn.SyncBatchNorm.__doc__

    @classmethod
    def convert_sync_batchnorm(cls, module: Any, process_group: Any = None) -> Any:
        """torch's, which keeps activations of batch-norms, too."""
        converted = super().convert_sync_batchnorm(module, process_group)
        if type(converted) is nn.SyncBatchNorm:
            converted.__class__ = cls
            converted.activation = getattr(module, "activation", None)
        return converted

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return super().forward(input, residual)
        if self.training and _synchronises(input, self.process_group):
            output = nn.SyncBatchNorm.forward(self, input)
            return native_ending(output, self.activation, residual)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return super().forward(input, residual)


def _synchronises(input: Tensor, group: Any) -> bool:
    """Whether torch would share statistics with other processes, or refuse a tensor on the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return input.is_cpu or dist.get_world_size(group or dist.group.WORLD) > 1
