"""ResNet and its relatives: stages of residual blocks."""

from collections.abc import Callable

from torch import nn

from torchops.bench.models.layers import Residual, SqueezeExcitation, classifier, conv_bn

Block = Callable[[int, int, int], nn.Module]  # (in_channels, out_channels, stride) -> main path


def stage(
    block: Block, in_channels: int, out_channels: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` residual blocks; the first one changes channels and size, its shortcut follows."""
    blocks = []
    for _ in range(depth):
        shortcut = None
        if stride != 1 or in_channels != out_channels:
            shortcut = conv_bn(in_channels, out_channels, 1, stride, activation=None)
        body = block(in_channels, out_channels, stride)
        blocks.append(Residual(body, shortcut, nn.ReLU(inplace=True)))
        in_channels, stride = out_channels, 1
    return nn.Sequential(*blocks)


def basic_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(in_channels, out_channels, 3, stride),
        conv_bn(out_channels, out_channels, 3, activation=None),
    )


def bottleneck(groups: int = 1, width_factor: int = 1) -> Block:
    """1x1 down, 3x3, 1x1 up, with the stride in the 3x3 ("v1.5")."""

    def block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        width = out_channels // 4 * width_factor
        return nn.Sequential(
            conv_bn(in_channels, width),
            conv_bn(width, width, 3, stride, groups),
            conv_bn(width, out_channels, activation=None),
        )

    return block


def small_resnet(in_channels: int = 1, depth: int = 1) -> nn.Sequential:
    """The ResNet that He et al. used for CIFAR-10: three stages of `depth` basic blocks, that is
    6 * depth + 2 layers."""
    return nn.Sequential(
        conv_bn(in_channels, 16, 3),
        stage(basic_block, 16, 16, depth, stride=1),
        stage(basic_block, 16, 32, depth, stride=2),
        stage(basic_block, 32, 64, depth, stride=2),
        classifier(64, classes=10),
    )


def resnet(block: Block, widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [conv_bn(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)]
    in_channels, stride = 64, 1
    for width, depth in zip(widths, depths, strict=True):
        layers.append(stage(block, in_channels, width, depth, stride))
        in_channels, stride = width, 2
    return nn.Sequential(*layers, classifier(in_channels))


def resnet18() -> nn.Sequential:
    """https://arxiv.org/abs/1512.03385"""
    return resnet(basic_block, (64, 128, 256, 512), (2, 2, 2, 2))


def resnet50() -> nn.Sequential:
    """https://arxiv.org/abs/1512.03385"""
    return resnet(bottleneck(), (256, 512, 1024, 2048), (3, 4, 6, 3))


def resnext50_32x4d() -> nn.Sequential:
    """https://arxiv.org/abs/1611.05431"""
    return resnet(bottleneck(groups=32, width_factor=2), (256, 512, 1024, 2048), (3, 4, 6, 3))


def wide_resnet50_2() -> nn.Sequential:
    """https://arxiv.org/abs/1605.07146"""
    return resnet(bottleneck(width_factor=2), (256, 512, 1024, 2048), (3, 4, 6, 3))


def regnet_y_3_2gf() -> nn.Sequential:
    """https://arxiv.org/abs/2003.13678"""

    def block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            conv_bn(in_channels, out_channels),
            conv_bn(out_channels, out_channels, 3, stride, groups=out_channels // 24),
            SqueezeExcitation(out_channels, in_channels // 4, nn.ReLU),
            conv_bn(out_channels, out_channels, activation=None),
        )

    return nn.Sequential(
        conv_bn(3, 32, 3, stride=2),
        stage(block, 32, 72, 2, stride=2),
        stage(block, 72, 216, 5, stride=2),
        stage(block, 216, 576, 13, stride=2),
        stage(block, 576, 1512, 1, stride=2),
        classifier(1512),
    )
