"""ResNet and its relatives: stages of residual blocks."""

from collections.abc import Callable

from torch import Tensor, nn

from torchops.bench.models.layers import SqueezeExcitation, classifier, conv, conv_bn

# (in_channels, out_channels, stride) -> main path, up to the convolution before the last batch-norm
Body = Callable[[int, int, int], nn.Module]


class ResidualBlock(nn.Module):
    """relu(norm(body(input)) + shortcut(input)); the shortcut follows a change of shape."""

    def __init__(self, body: Body, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = body(in_channels, out_channels, stride)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_bn(in_channels, out_channels, 1, stride, activation=None)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.norm(self.body(input)) + self.shortcut(input))


def stage(
    body: Body, in_channels: int, out_channels: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` residual blocks, of which the first changes the number of channels and the size."""
    first = ResidualBlock(body, in_channels, out_channels, stride)
    rest = (ResidualBlock(body, out_channels, out_channels, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def basic(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        conv_bn(in_channels, out_channels, 3, stride), conv(out_channels, out_channels, 3)
    )


def bottleneck(groups: int = 1, width_factor: int = 1) -> Body:
    """1x1 down, 3x3, 1x1 up, with the stride in the 3x3 ("v1.5")."""

    def body(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        width = out_channels // 4 * width_factor
        return nn.Sequential(
            conv_bn(in_channels, width),
            conv_bn(width, width, 3, stride, groups),
            conv(width, out_channels),
        )

    return body


def small_resnet(in_channels: int = 1, depth: int = 1) -> nn.Sequential:
    """The ResNet that He et al. used for CIFAR-10: three stages of `depth` basic blocks, that is
    6 * depth + 2 layers deep."""
    return nn.Sequential(
        conv_bn(in_channels, 16, 3),
        stage(basic, 16, 16, depth, stride=1),
        stage(basic, 16, 32, depth, stride=2),
        stage(basic, 32, 64, depth, stride=2),
        classifier(64, classes=10),
    )


def resnet(body: Body, widths: tuple[int, ...], depths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [conv_bn(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)]
    in_channels, stride = 64, 1
    for width, depth in zip(widths, depths, strict=True):
        layers.append(stage(body, in_channels, width, depth, stride))
        in_channels, stride = width, 2
    return nn.Sequential(*layers, classifier(in_channels))


def resnet18() -> nn.Sequential:
    """https://arxiv.org/abs/1512.03385"""
    return resnet(basic, (64, 128, 256, 512), (2, 2, 2, 2))


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

    def body(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            conv_bn(in_channels, out_channels),
            conv_bn(out_channels, out_channels, 3, stride, groups=out_channels // 24),
            SqueezeExcitation(out_channels, in_channels // 4, nn.ReLU),
            conv(out_channels, out_channels),
        )

    return nn.Sequential(
        conv_bn(3, 32, 3, stride=2),
        stage(body, 32, 72, 2, stride=2),
        stage(body, 72, 216, 5, stride=2),
        stage(body, 216, 576, 13, stride=2),
        stage(body, 576, 1512, 1, stride=2),
        classifier(1512),
    )
