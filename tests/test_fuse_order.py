"""One call for several stands where the last of them stood: what is written between, counts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops
from test_convert import BasicBlock, left_to_torch


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.shortcut = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
        self.downsample = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))


class WritesByOption(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + F.relu(x, inplace=True))


class WritesByPosition(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + F.relu(x, True))


class WritesByName(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + torch.relu_(x))


class WritesByOperator(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        x *= 2
        return F.relu(out + x)


class WritesWithoutAdding(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        x.mul_(2)
        return F.relu(out)


class WritesInASubmodule(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + self.shortcut(x))


class WritesThroughAView(Layers):
    def forward(self, x: Tensor) -> Tensor:
        view = x.view_as(x)
        out = self.bn(self.conv(x))
        view.mul_(2)
        return F.relu(out)


class WritesTheOtherOperand(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        x += out
        return F.relu(x) + x


class WritesItsInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return F.relu(self.bn(self.conv(x)))


class CountsANumber(Layers):
    def forward(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        more = channels
        more += 1
        return F.relu(self.bn(self.conv(x)[:, :channels])) * more


class CallsTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + self.bn(3 * x + 2))


WRITING = [
    WritesByOption, WritesByPosition, WritesByName, WritesByOperator, WritesWithoutAdding,
    WritesInASubmodule, WritesThroughAView, WritesTheOtherOperand, WritesItsInput, CountsANumber,
    CallsTwice,
]  # fmt: skip


def pair(block: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Native and converted."""
    torch.manual_seed(0)
    reference = block().double()
    for tensor in (reference.bn.weight, reference.bn.bias, reference.bn.running_mean):
        nn.init.normal_(tensor)
    return reference, torchops.convert(copy.deepcopy(reference))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", WRITING)
def test_outputs_inputs_and_statistics(block: type[nn.Module], training: bool) -> None:
    found = []
    for model in pair(block):
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            output = model.train(training)(x)
        found.append([output, x, *model.buffers()])
    torch.testing.assert_close(*found)


class WritesElsewhere(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(self.conv(x)))
        return F.relu(out + self.downsample(x))


class OnlyReads(Layers):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + self.conv(x))


@pytest.mark.parametrize("block", [WritesElsewhere, OnlyReads])
def test_calls_between_that_write_nothing_of_it(block: type[nn.Module]) -> None:
    reference, model = pair(block)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(x))
    assert left_to_torch(model, x) == left_to_torch(reference, x)[:-1]


@pytest.mark.parametrize("watched", [["conv2"], ["bn2", "downsample.0"], ["conv1"]])
def test_hooks_see_the_order_of_the_forward(watched: list[str]) -> None:
    down = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    found = []
    block = BasicBlock(3, down).eval()
    for model in (block, torchops.convert(copy.deepcopy(block))):
        order: list[str] = []
        for name in watched:
            hook = lambda *_, name=name, order=order: order.append(name)  # noqa: E731
            model.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            model(torch.randn(2, 3, 5, 5))
        found.append(order)
    assert found[0] == found[1]


class AddsAside(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", [BasicBlock, AddsAside])
def test_a_residual_that_autocast_did_not_cast(block: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    reference = block(3).train(training)
    model = torchops.convert(copy.deepcopy(reference))
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(x), reference(x)
    assert output.dtype is expected.dtype is (torch.bfloat16, torch.float32)[block is AddsAside]
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.05)


def test_a_residual_without_a_device() -> None:
    model = torchops.convert(BasicBlock(3)).eval().to("meta")
    assert model(torch.empty(2, 3, 5, 5, device="meta")).shape == (2, 3, 5, 5)
