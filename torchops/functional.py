"""The operators as functions: names and signatures of torch.nn.functional, plus our own."""

from torchops.ops.avg_pool2d import avg_pool1d, avg_pool2d
from torchops.ops.batch_norm import batch_norm
from torchops.ops.conv2d import (
    conv1d,
    conv1x1,
    conv2d,
    conv3d,
    convolution2d,
    cross_correlation2d,
)
from torchops.ops.conv2d_bn_act import conv2d_bn_act
from torchops.ops.max_pool2d import max_pool1d, max_pool2d

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv1x1",
    "conv2d",
    "conv2d_bn_act",
    "conv3d",
    "convolution2d",
    "cross_correlation2d",
    "max_pool1d",
    "max_pool2d",
]
