"""The operators as functions: names and signatures of torch.nn.functional, plus our own."""

from torchops.ops.adaptive_avg_pool2d import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
)
from torchops.ops.adaptive_max_pool2d import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
)
from torchops.ops.avg_pool2d import avg_pool1d, avg_pool2d, avg_pool3d
from torchops.ops.batch_norm import batch_norm
from torchops.ops.channel_pool import channel_avg_pool, channel_max_pool
from torchops.ops.conv2d import conv1d, conv1x1, conv2d, conv3d, convolution2d, cross_correlation2d
from torchops.ops.conv2d_bn_act import conv2d_bn_act
from torchops.ops.max_pool2d import max_pool1d, max_pool2d, max_pool3d

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "channel_avg_pool",
    "channel_max_pool",
    "conv1d",
    "conv1x1",
    "conv2d",
    "conv2d_bn_act",
    "conv3d",
    "convolution2d",
    "cross_correlation2d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
]
