"""One layer call as plain numbers: the unit that the benchmark lists, runs and reports.

A Problem holds what a call is, not how it is run: dtype, layout, device and thread count belong to
the run. Sizes are tuples with one entry per spatial dimension, in torch's order (depth, height,
width); a batch_norm may have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", "sigmoid")

CONVS = ("conv1d", "conv2d", "conv3d", "conv1x1", "conv2d_bn_act")
POOLS = tuple(f"{kind}_pool{n}d" for kind in ("max", "avg") for n in (1, 2, 3))
ADAPTIVE_POOLS = tuple(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))
CHANNEL_POOLS = ("channel_max_pool", "channel_avg_pool")
OPS = (*CONVS, *POOLS, *ADAPTIVE_POOLS, *CHANNEL_POOLS, "batch_norm")

FAMILIES = (
    *("dense", "pointwise", "depthwise", "grouped", "conv+bn+act"),
    *("pooling", "channel pooling", "batch_norm", "batch_norm+act"),
)


class ProblemError(ValueError):
    """A problem that cannot be run, or a problem string that cannot be read."""


def dims(op: str) -> int | None:
    """How many spatial dimensions `op` works on; None where any number will do."""
    if op in ("conv1x1", "conv2d_bn_act"):
        return 2
    return int(op[-2]) if op[-1] == "d" else None


@dataclass(frozen=True)
class Problem:
    """A call of `op`. Fields that the op does not have keep their defaults.

    `kernel_size` of a channel pool is its one window over channels. `adaptive_size` is the output
    size that an adaptive pool is asked for. `training` False is a forward pass without gradients,
    and a batch_norm by its running statistics. `first` marks a network's first layer, whose input
    is an image and needs no gradient.
    """

    op: str
    batch: int
    in_channels: int
    input_size: tuple[int, ...]
    out_channels: int = 0
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    adaptive_size: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = True
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    training: bool = True
    first: bool = False

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ProblemError(f"unknown op {self.op!r}; known: {', '.join(OPS)}")
        self._require_positive()
        if self.op in CONVS:
            self._check_channels()
        if self.op in POOLS:
            self._check_pool_padding()
        if any(size < 1 for size in self.output_size):
            raise ProblemError(
                f"output size {self.output_size} is empty: kernel {self.kernel_size} does not fit "
                f"into input {self.input_size} with padding {self.padding}"
            )

    def _require_positive(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            least = 0 if field.name in ("padding", "out_channels") else 1
            for number in numbers:
                if type(number) is int and number < least:
                    raise ProblemError(f"{field.name} must be at least {least}, got {number}")

    def _check_channels(self) -> None:
        for name in ("in_channels", "out_channels"):
            channels = getattr(self, name)
            if channels < 1 or channels % self.groups:
                raise ProblemError(
                    f"{name} must be a multiple of groups, got {channels} with {self.groups} groups"
                )

    def _check_pool_padding(self) -> None:
        for pad, kernel in zip(self.padding, self.kernel_size, strict=True):
            if pad > kernel // 2:
                raise ProblemError(
                    f"padding of a pool must be at most kernel / 2, got {pad} with {kernel}"
                )

    @property
    def channels(self) -> int:
        """Channels of the output."""
        if self.op in CONVS:
            return self.out_channels
        if self.op in CHANNEL_POOLS:
            return (self.in_channels - self.kernel_size[0]) // self.stride[0] + 1
        return self.in_channels

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        if self.op in ADAPTIVE_POOLS:
            return self.adaptive_size
        if self.op in CONVS or self.op in POOLS:
            return tuple(map(self._windows, range(len(self.input_size))))
        return self.input_size

    def _windows(self, i: int) -> int:
        size, stride, padding = self.input_size[i], self.stride[i], self.padding[i]
        dilation = self.dilation[i] if self.dilation else 1
        room = size + 2 * padding - dilation * (self.kernel_size[i] - 1) - 1
        if not self.ceil_mode:
            return room // stride + 1
        count = -(-room // stride) + 1
        # The last window must start inside the input or the left padding, as torch has it.
        return count - 1 if (count - 1) * stride >= size + padding else count

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.output_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of a conv's weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def family(self) -> str:
        """The one of FAMILIES that totals are taken over; batch_norms apart in evaluation."""
        if self.op == "conv2d_bn_act":
            return "conv+bn+act"
        if self.op in CONVS:
            return self._conv_family()
        if self.op == "batch_norm":
            name = "batch_norm+act" if self.activation or self.residual else "batch_norm"
            return name if self.training else f"{name} eval"
        return "channel pooling" if self.op in CHANNEL_POOLS else "pooling"

    def _conv_family(self) -> str:
        if self.groups > 1:
            return "depthwise" if self.groups == self.in_channels else "grouped"
        return "pointwise" if math.prod(self.kernel_size) == 1 else "dense"

    def __str__(self) -> str:
        """The problem string, such that `parse` reads it back."""
        from torchops.bench.parse import unparse

        return unparse(self)
