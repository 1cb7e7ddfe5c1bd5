"""The networks that the benchmark and the demo run, written once from torch.nn layers.

Widths, depths and parameter counts are the published ones (tests/test_bench_models.py holds the
list). Dropout and stochastic depth are left out: they have no parameters and next to no cost, and
without them two runs of one network can be compared number by number.

`NETWORKS` maps a name to its builder and the shape of one input image.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from torchops.bench.models.convnext import convnext_tiny
from torchops.bench.models.googlenet import googlenet
from torchops.bench.models.lenet import bn_lenet, lenet
from torchops.bench.models.mobile import efficientnet_b0, mobilenet_v2
from torchops.bench.models.plain import nin, vgg16
from torchops.bench.models.resnet import (
    regnet_y_3_2gf,
    resnet18,
    resnet50,
    resnext50_32x4d,
    small_resnet,
    wide_resnet50_2,
)


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    input: tuple[int, int, int]  # channels, height, width


IMAGENET = (3, 224, 224)
NETWORKS = {
    "lenet": Network(lenet, (1, 28, 28)),
    "bn_lenet": Network(bn_lenet, (1, 28, 28)),
    "small_resnet": Network(small_resnet, (1, 28, 28)),
    "vgg16": Network(vgg16, IMAGENET),
    "nin": Network(nin, IMAGENET),
    "googlenet": Network(googlenet, IMAGENET),
    "resnet18": Network(resnet18, IMAGENET),
    "resnet50": Network(resnet50, IMAGENET),
    "resnext50_32x4d": Network(resnext50_32x4d, IMAGENET),
    "wide_resnet50_2": Network(wide_resnet50_2, IMAGENET),
    "mobilenet_v2": Network(mobilenet_v2, IMAGENET),
    "efficientnet_b0": Network(efficientnet_b0, IMAGENET),
    "convnext_tiny": Network(convnext_tiny, IMAGENET),
    "regnet_y_3_2gf": Network(regnet_y_3_2gf, IMAGENET),
}
