"""The plain stacks of convolutions: VGG-16 and Network in Network."""

from torch import nn


def conv_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0
) -> nn.Sequential:
    """Convolution and ReLU. Without batch-norm torch's default weights let the signal die out in a
    deep network, so they are drawn as in He et al., https://arxiv.org/abs/1502.01852."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.ReLU(inplace=True))


def vgg16() -> nn.Sequential:
    """VGG-16 without batch-norm, https://arxiv.org/abs/1409.1556."""
    features: list[nn.Module] = []
    in_channels = 3
    for depth, out_channels in (2, 64), (2, 128), (3, 256), (3, 512), (3, 512):
        for _ in range(depth):
            features.append(conv_relu(in_channels, out_channels, 3, padding=1))
            in_channels = out_channels
        features.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *features,
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Sequential(nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
        nn.Linear(4096, 1000),
    )


def nin() -> nn.Sequential:
    """Network in Network for ImageNet, https://arxiv.org/abs/1312.4400."""

    def block(
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        last: int | None = None,
    ) -> nn.Sequential:
        return nn.Sequential(
            conv_relu(in_channels, out_channels, kernel_size, stride, padding),
            conv_relu(out_channels, out_channels),
            conv_relu(out_channels, last or out_channels),
        )

    return nn.Sequential(
        block(3, 96, 11, stride=4),
        nn.MaxPool2d(3, 2),
        block(96, 256, 5, padding=2),
        nn.MaxPool2d(3, 2),
        block(256, 384, 3, padding=1),
        nn.MaxPool2d(3, 2),
        block(384, 1024, 3, padding=1, last=1000),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
