"""The benchmark's networks are the published ones: parameters, multiply-adds, output shapes.

Parameters and multiply-adds of the ImageNet networks are those in torchvision's model tables
(its GoogLeNet without the auxiliary classifiers). LeNet-5 and NiN are counted from their papers'
layer tables, ResNet-20 is the CIFAR-10 network of He et al. with projection shortcuts.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchops.bench.models import NETWORKS
from torchops.bench.models.resnet import small_resnet

PARAMETERS = {
    "lenet": 61_706,
    "bn_lenet": 61_706 + 2 * (6 + 16 + 120 + 84),
    "small_resnet": 78_042
    - 2 * 16 * 3 * 3,  # ResNet-8 of MLPerf Tiny, one input channel, not three
    "vgg16": 138_357_544,
    "nin": 7_595_176,
    "googlenet": 6_624_904,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet50_2": 68_883_240,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "convnext_tiny": 28_589_128,
    "regnet_y_3_2gf": 19_436_338,
}

GIGA_MULTIPLY_ADDS = {
    "vgg16": 15.47,
    "googlenet": 1.498,
    "resnet18": 1.814,
    "resnet50": 4.089,
    "resnext50_32x4d": 4.23,
    "wide_resnet50_2": 11.398,
    "mobilenet_v2": 0.301,
    "efficientnet_b0": 0.386,
    "convnext_tiny": 4.456,
    "regnet_y_3_2gf": 3.176,
}


def on_meta(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network and a batch of two images, without memory behind them."""
    network = NETWORKS[name]
    with torch.device("meta"):
        return network.build(), torch.empty(2, *network.input)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_network_has_a_published_count():
    assert PARAMETERS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(name):
    model, _ = on_meta(name)
    assert parameter_count(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_output_shape(name):
    model, images = on_meta(name)
    classes = 10 if images.shape[1] == 1 else 1000
    assert model(images).shape == (2, classes)


@pytest.mark.parametrize("name", GIGA_MULTIPLY_ADDS)
def test_multiply_adds(name):
    model, images = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        model(images)
    per_image = counter.get_total_flops() / images.shape[0] / 2
    assert round(per_image / 1e9, 3) == GIGA_MULTIPLY_ADDS[name]


@pytest.mark.parametrize(("depth", "count"), [(1, 78_042), (3, 272_474)])
def test_small_resnet_is_the_cifar_resnet(depth, count):
    with torch.device("meta"):
        assert parameter_count(small_resnet(in_channels=3, depth=depth)) == count


@pytest.mark.parametrize("name", ["lenet", "bn_lenet", "small_resnet"])
def test_one_training_step_reaches_every_parameter(name):
    network = NETWORKS[name]
    torch.manual_seed(0)
    model = network.build()
    images = torch.randn(4, *network.input)
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
