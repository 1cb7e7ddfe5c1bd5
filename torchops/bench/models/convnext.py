"""ConvNeXt-T: depthwise 7x7 convolutions between linear layers."""

import torch
from torch import Tensor, nn

from torchops.bench.models.layers import Residual


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, input: Tensor) -> Tensor:
        return input.permute(self.dims)


class LayerScale(nn.Module):
    """A learned factor per channel, 1e-6 at first, https://arxiv.org/abs/2103.17239."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight


def layer_norm_2d(channels: int) -> nn.Sequential:
    return nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(channels, eps=1e-6), Permute(0, 3, 1, 2))


def convnext_block(channels: int) -> Residual:
    """Depthwise 7x7, then two linear layers per pixel."""
    return Residual(
        nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
        Permute(0, 2, 3, 1),
        nn.LayerNorm(channels, eps=1e-6),
        nn.Linear(channels, 4 * channels),
        nn.GELU(),
        nn.Linear(4 * channels, channels),
        Permute(0, 3, 1, 2),
        LayerScale(channels),
    )


def convnext_tiny() -> nn.Sequential:
    """https://arxiv.org/abs/2201.03545"""
    layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), layer_norm_2d(96)]
    in_channels = 96
    for channels, depth in (96, 3), (192, 3), (384, 9), (768, 3):
        if channels != in_channels:
            layers += [layer_norm_2d(in_channels), nn.Conv2d(in_channels, channels, 2, 2)]
        layers += [convnext_block(channels) for _ in range(depth)]
        in_channels = channels
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        layer_norm_2d(768),
        nn.Flatten(),
        nn.Linear(768, 1000),
    )
