"""Cases of channel_max_pool and channel_avg_pool; their twin is native's 2-D pool on views."""

import math

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import Case, Sample, distinct


def across_channels(pool):
    def native(input, kernel_size, stride=None):
        stride = stride or kernel_size
        if torch._prims_common.suggest_memory_format(input) is torch.channels_last:
            pixels = input.permute(0, 2, 3, 1)
            output = pool(pixels.reshape(-1, 1, 1, pixels.shape[-1]), (1, kernel_size), (1, stride))
            return output.reshape(*pixels.shape[:-1], -1).permute(0, 3, 1, 2)
        batch, channels, *rest = input.shape
        maps = input.reshape(batch, 1, channels, math.prod(rest))
        output = pool(maps, (kernel_size, 1), (stride, 1))
        return output.reshape(batch, output.shape[2], *rest)

    return native


def sample(shape, kernel_size, **kwargs):
    return Sample((shape,), {"kernel_size": kernel_size, **kwargs})


SAMPLES = [
    sample((2, 12, 7, 5), 3),
    sample((2, 33, 7, 5), 4, stride=3),
    sample((1, 72, 19, 3), 2),
    sample((3, 10), 2),
    sample((2, 9, 4, 3, 2), 3, stride=1),
    sample((0, 4, 3, 3), 2),
    sample((2, 33, 5), 5, stride=2),
]
SMALL = [sample((2, 5, 2, 3), 2, stride=1), sample((2, 6, 3), 3)]

CASES = [
    Case(
        "channel_max_pool",
        TF.channel_max_pool,
        across_channels(F.max_pool2d),
        SAMPLES,
        SMALL,
        make_tensors=distinct,
        exact=True,
        composed=lambda sample: True,
    ),
    Case(
        "channel_avg_pool",
        TF.channel_avg_pool,
        across_channels(F.avg_pool2d),
        SAMPLES,
        SMALL,
        composed=lambda sample: True,
    ),
]
