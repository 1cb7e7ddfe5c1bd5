"""The operators as layers: subclasses of their torch.nn twins, same names, arguments and keys."""

from torchops.nn.adaptive_avg_pool2d import AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d
from torchops.nn.adaptive_max_pool2d import AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d
from torchops.nn.avg_pool2d import AvgPool1d, AvgPool2d, AvgPool3d
from torchops.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    SyncBatchNorm,
)
from torchops.nn.channel_pool import ChannelAvgPool, ChannelMaxPool
from torchops.nn.conv2d import Conv1d, Conv1x1, Conv2d, Conv3d, LazyConv1d, LazyConv2d, LazyConv3d
from torchops.nn.conv2d_bn_act import ConvBNAct
from torchops.nn.max_pool2d import MaxPool1d, MaxPool2d, MaxPool3d

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelAvgPool",
    "ChannelMaxPool",
    "Conv1d",
    "Conv1x1",
    "Conv2d",
    "Conv3d",
    "ConvBNAct",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "SyncBatchNorm",
]
