"""Suites: the layers of a network as they really are."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchops.bench.counts import count
from torchops.bench.models import NETWORKS, Network
from torchops.bench.parse import parse
from torchops.bench.suites import ALL, network_name, suite


def test_lenet_by_hand():
    assert suite("lenet", batch=4) == {
        parse("conv2d:mb4_ic1ih28oc6kh5ph2_bias_first"): 1,
        parse("max_pool2d:mb4_ic6ih28kh2"): 1,
        parse("conv2d:mb4_ic6ih14oc16kh5_bias"): 1,
        parse("max_pool2d:mb4_ic16ih10kh2"): 1,
    }


def test_resnet50_has_its_published_layers():
    calls = suite("resnet50", batch=2)
    by_op = {}
    for problem, n in calls.items():
        by_op[problem.op] = by_op.get(problem.op, 0) + n
    assert by_op == {"conv2d": 53, "batch_norm": 53, "max_pool2d": 1, "adaptive_avg_pool2d": 1}
    norms = {p: n for p, n in calls.items() if p.op == "batch_norm"}
    # 16 blocks end in bn -> add -> relu, 4 shortcuts in a plain bn, all others in bn -> relu.
    assert sum(n for p, n in norms.items() if p.residual and p.activation == "relu") == 16
    assert sum(n for p, n in norms.items() if p.activation is None) == 4
    assert sum(n for p, n in norms.items() if not p.residual and p.activation == "relu") == 33
    assert [p for p in calls if p.first] == [parse("conv2d:mb2_ic3ih224oc64kh7sh2ph3_first")]


@pytest.mark.parametrize("name", NETWORKS)
def test_convs_add_up_to_the_network(name):
    network = NETWORKS[name]
    with torch.device("meta"):
        model, images = network.build(), torch.empty(2, *network.input)
    with FlopCounterMode(display=False) as counter:
        model(images)
    expected = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    convs = {p: n for p, n in suite(name, batch=2).items() if p.op == "conv2d"}
    assert sum(n * count(p, torch.float32, "fwd").flops for p, n in convs.items()) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_every_problem_has_a_string(name):
    for problem in suite(name, batch=2):
        assert parse(str(problem)) == problem


def test_activations_of_mobile_networks():
    activations = {
        name: {problem.activation for problem in suite(name, batch=1) if problem.activation}
        for name in ("mobilenet_v2", "efficientnet_b0")
    }
    assert activations == {"mobilenet_v2": {"relu6"}, "efficientnet_b0": {"silu"}}


def test_evaluation():
    problems = suite("bn_lenet", batch=1, training=False)
    assert not any(problem.training for problem in problems)


class ReadTwice(nn.Module):
    """What lies between batch_norm and activation has another reader: nothing may be taken up."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, input):
        between = self.bn(input)
        return torch.relu(between) + between


class Spellings(nn.Module):
    """The same fold in the ways that networks write it."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(5)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input):
        input = self.relu(self.norms[0](input))
        input = torch.relu(self.norms[1](input) + input)
        identity = input
        input = self.norms[2](input)
        input += identity
        input = self.relu(input)
        input = (input + self.norms[3](input)).relu_()
        return nn.functional.leaky_relu(self.norms[4](input), 0.2)


@pytest.fixture
def network(monkeypatch):
    def install(module):
        monkeypatch.setitem(NETWORKS, "probe", Network(module, (4, 8, 8)))
        return list(suite("probe", batch=1).items())

    return install


def test_a_second_reader_prevents_the_fold(network):
    assert network(ReadTwice) == [(parse("batch_norm:mb1_ic4ih8"), 1)]


def test_folds_in_every_spelling(network):
    assert network(Spellings) == [
        (parse("batch_norm:mb1_ic4ih8_act=relu"), 1),
        (parse("batch_norm:mb1_ic4ih8_act=relu_res"), 3),
        # A slope of 0.2 is none that a batch_norm can take up.
        (parse("batch_norm:mb1_ic4ih8"), 1),
    ]


def test_string_padding(network):
    same = network(lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2))
    assert same == [(parse("conv2d:mb1_ic4ih8oc4kh3ph2dh2_bias_first"), 1)]


def test_names():
    assert network_name("convnext") == "convnext_tiny"
    assert network_name("lenet") == "lenet"
    assert all(network_name(name) == name for name in ALL)
    with pytest.raises(ValueError, match="suite 'resnet' is ambiguous: resnet18, resnet50, or all"):
        network_name("resnet")
    with pytest.raises(ValueError, match="suite 'alexnet' is unknown: lenet,"):
        network_name("alexnet")
