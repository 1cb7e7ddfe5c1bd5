"""Networks of inverted residual blocks: MobileNetV2 and EfficientNet-B0."""

from torch import nn

from torchops.bench.models.layers import Residual, SqueezeExcitation, classifier, conv_bn


def inverted_residual(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
    expansion: int,
    activation: type[nn.Module],
    squeeze: bool,
) -> nn.Module:
    """1x1 up, depthwise, (squeeze-excitation,) 1x1 down; residual where the shape stays."""
    width = in_channels * expansion
    layers: list[nn.Module] = []
    if expansion != 1:
        layers.append(conv_bn(in_channels, width, activation=activation))
    layers.append(conv_bn(width, width, kernel_size, stride, width, activation))
    if squeeze:
        layers.append(SqueezeExcitation(width, in_channels // 4, activation))
    layers.append(conv_bn(width, out_channels, activation=None))
    keeps_shape = stride == 1 and in_channels == out_channels
    return Residual(*layers) if keeps_shape else nn.Sequential(*layers)


def mobile_network(
    table: list[tuple[int, int, int, int, int]],
    activation: type[nn.Module],
    squeeze: bool,
) -> nn.Sequential:
    """`table` rows: expansion, kernel_size, out_channels, depth, stride of the first block."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, stride=2, activation=activation)]
    in_channels = 32
    for expansion, kernel_size, out_channels, depth, stride in table:
        for _ in range(depth):
            layers.append(
                inverted_residual(
                    in_channels, out_channels, kernel_size, stride, expansion, activation, squeeze
                )
            )
            in_channels, stride = out_channels, 1
    layers.append(conv_bn(in_channels, 1280, activation=activation))
    return nn.Sequential(*layers, classifier(1280))


def mobilenet_v2() -> nn.Sequential:
    """https://arxiv.org/abs/1801.04381"""
    table = [
        (1, 3, 16, 1, 1),
        (6, 3, 24, 2, 2),
        (6, 3, 32, 3, 2),
        (6, 3, 64, 4, 2),
        (6, 3, 96, 3, 1),
        (6, 3, 160, 3, 2),
        (6, 3, 320, 1, 1),
    ]
    return mobile_network(table, nn.ReLU6, squeeze=False)


def efficientnet_b0() -> nn.Sequential:
    """https://arxiv.org/abs/1905.11946"""
    table = [
        (1, 3, 16, 1, 1),
        (6, 3, 24, 2, 2),
        (6, 5, 40, 2, 2),
        (6, 3, 80, 3, 2),
        (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    ]
    return mobile_network(table, nn.SiLU, squeeze=True)
