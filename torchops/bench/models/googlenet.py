"""GoogLeNet, whose blocks run four branches side by side."""

import torch
from torch import Tensor, nn

from torchops.bench.models.layers import classifier, conv_bn


class Branches(nn.ModuleList):
    """Every branch on the same input, outputs side by side along the channels."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([branch(input) for branch in self], dim=1)


def inception(
    in_channels: int,
    one: int,
    three_reduced: int,
    three: int,
    five_reduced: int,
    five: int,
    pooled: int,
) -> Branches:
    """GoogLeNet's block. The "5x5" branch is 3x3, as in torchvision and the TensorFlow weights."""

    def conv(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Module:
        return conv_bn(in_channels, out_channels, kernel_size, eps=1e-3)

    return Branches(
        [
            conv(in_channels, one),
            nn.Sequential(conv(in_channels, three_reduced), conv(three_reduced, three, 3)),
            nn.Sequential(conv(in_channels, five_reduced), conv(five_reduced, five, 3)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv(in_channels, pooled)),
        ]
    )


def googlenet() -> nn.Sequential:
    """GoogLeNet with batch-norm, without the auxiliary classifiers, https://arxiv.org/abs/1409.4842."""
    return nn.Sequential(
        conv_bn(3, 64, 7, stride=2, eps=1e-3),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        conv_bn(64, 64, eps=1e-3),
        conv_bn(64, 192, 3, eps=1e-3),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        inception(192, 64, 96, 128, 16, 32, 32),
        inception(256, 128, 128, 192, 32, 96, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        inception(480, 192, 96, 208, 16, 48, 64),
        inception(512, 160, 112, 224, 24, 64, 64),
        inception(512, 128, 128, 256, 24, 64, 64),
        inception(512, 112, 144, 288, 32, 64, 64),
        inception(528, 256, 160, 320, 32, 128, 128),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        inception(832, 256, 160, 320, 32, 128, 128),
        inception(832, 384, 192, 384, 48, 128, 128),
        classifier(1024),
    )
