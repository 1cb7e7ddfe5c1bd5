"""torchops.convert and revert: what they change, what they leave, and that both can be undone."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchops
import torchops.nn as tnn
from torchops import _tolerance
from torchops.fuse import Folded


class BasicBlock(nn.Module):
    """As torchvision writes it: one ReLU module for two sites, an in-place add."""

    def __init__(self, channels: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.bn_method = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.bn_method(x).sigmoid()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.MaxPool2d(2))
        down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList([BasicBlock(8), BasicBlock(8, down)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(x).flatten(1))


def assert_same_training_step(model: nn.Module, reference: nn.Module, input: Tensor) -> None:
    for net in (model, reference):
        net.zero_grad()
    output, expected = model(input), reference(input)
    assert _tolerance.check(output, expected.double(), dtype=torch.float64)
    output.square().sum().backward()
    expected.square().sum().backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        scale = max(1.0, parameter.grad.abs().max().item())
        result = _tolerance.check(parameters[name].grad, parameter.grad, scale=scale * 64)
        assert result, (name, result.reason)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


@pytest.mark.parametrize("fuse", [True, False])
def test_same_numbers_and_state(fuse: bool) -> None:
    torch.manual_seed(0)
    reference = Net().double()
    model = copy.deepcopy(reference)
    keys = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    assert torchops.convert(model, fuse=fuse) is model
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    input = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert_same_training_step(model, reference, input)
    assert_same_training_step(model.eval(), reference.eval(), input)


def test_every_activation_of_the_net_is_fused() -> None:
    model = torchops.convert(Net())
    assert [m.activation for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [
        "silu", "relu", "relu", "relu", "relu", None,
    ]  # fmt: skip
    assert isinstance(model.stem[2], Folded)


def test_fused_blocks_do_not_call_the_activation() -> None:
    model = torchops.convert(Net())
    calls = []
    for block in model.blocks:
        block.relu.forward = calls.append
    model(torch.randn(2, 3, 16, 16))
    assert calls == []


def test_revert_restores_classes_modules_and_numbers() -> None:
    torch.manual_seed(0)
    model = Net().double()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = copy.deepcopy(model)(input)
    assert torchops.revert(torchops.convert(model)) is model
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert torch.equal(model(input), expected)
    assert "_torchops_converted" not in model.pool.__dict__


def test_convert_twice_is_convert_once() -> None:
    model = torchops.convert(Net())
    once = repr(model)
    assert repr(torchops.convert(model)) == once
    torchops.revert(model)
    assert repr(model) == repr(Net())


def test_a_single_layer_is_converted() -> None:
    layer = nn.Conv2d(3, 8, 3)
    assert torchops.convert(layer) is layer
    assert type(layer) is tnn.Conv2d


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Scaled(3, 8, 3), nn.Conv2d(8, 8, 1))
    torchops.convert(model)
    assert type(model[0]) is Scaled
    assert type(model[1]) is tnn.Conv2d


def test_layers_built_by_hand_survive_revert() -> None:
    model = nn.Sequential(tnn.BatchNorm2d(3, activation="relu"), nn.MaxPool2d(2))
    torchops.revert(torchops.convert(model))
    assert type(model[0]) is tnn.BatchNorm2d
    assert model[0].activation == "relu"
    assert type(model[1]) is nn.MaxPool2d


def test_hooks_tied_weights_and_mode_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)).eval()
    model[1].weight = model[0].weight
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    torchops.convert(model)
    model(torch.randn(1, 3, 8, 8))
    assert seen == [tnn.Conv2d]
    assert model[1].weight is model[0].weight
    assert not model[0].training


@pytest.mark.parametrize("watched", [0, 1])
def test_a_hook_keeps_the_activation_apart(watched: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    seen = []
    model[watched].register_forward_hook(lambda module, args, output: seen.append(output))
    torchops.convert(model)
    assert type(model[1]) is nn.ReLU
    output = model(torch.randn(2, 3, 4, 4))
    assert (seen[0] < 0).any() == (watched == 0)
    assert (output >= 0).all()


def test_a_batch_norm_with_two_places_is_not_fused() -> None:
    shared, twice = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Sigmoid()))
    torchops.convert(model)
    torchops.convert(nn.Sequential(twice, nn.ReLU(), twice))
    assert shared.activation is None
    assert twice.activation is None


def test_unlike_activations_are_not_fused() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.BatchNorm2d(3), nn.GELU(approximate="tanh"),
        nn.BatchNorm2d(3), nn.LeakyReLU(), nn.BatchNorm2d(3), nn.Dropout(),
    )  # fmt: skip
    torchops.convert(model)
    assert [model[i].activation for i in (0, 2, 4, 6)] == [None, None, "leaky_relu", None]


def test_functional_and_method_forms() -> None:
    torch.manual_seed(0)
    reference = Functional().double()
    model = torchops.convert(copy.deepcopy(reference))
    assert (model.bn.activation, model.bn_method.activation) == ("relu", "sigmoid")
    assert_same_training_step(model, reference, torch.randn(2, 3, 9, 9, dtype=torch.float64))


class Deciding(nn.Module):
    """Blocks whose forward decides something that a recording would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.flag = False
        self.calls = 0


class ReadsFlag(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x)) if self.flag else self.bn(x)


class ReadsMode(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if self.training else F.relu(x)


class Counts(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.bn(x))


class Gambles(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if torch.rand(()) < 0.5 else self.bn(x)


class Looks(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) if x.sum() > 0 else self.bn(x)


@pytest.mark.parametrize("block", [ReadsFlag, ReadsMode, Counts, Gambles, Looks])
def test_a_forward_that_decides_is_left_as_it_is(block: type[nn.Module]) -> None:
    model = torchops.convert(block())
    assert type(model) is block
    assert model.bn.activation is None


class Broadcasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return F.relu(self.bn(x) + shift)


def test_a_broadcast_add_keeps_its_numbers() -> None:
    reference = Broadcasts().double()
    model = torchops.convert(copy.deepcopy(reference))
    assert model.bn.activation == "relu"
    x, shift = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(3, 1, 1)
    torch.testing.assert_close(model(x, shift), reference(x, shift))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused_and_revert(copier) -> None:
    torch.manual_seed(0)
    model = torchops.convert(Net().double())
    clone = copier(model)
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert repr(clone) == repr(model)
    assert torch.equal(clone(input), model(input))
    torchops.revert(clone)
    assert repr(clone) == repr(Net().double())
    assert model.blocks[0].bn1.activation == "relu"


def test_torch_save_and_load() -> None:
    model = torchops.convert(Net())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    input = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(input), model.eval()(input))


def test_compiles_without_graph_breaks() -> None:
    model = torchops.convert(Net())
    input = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), model(input))


def test_the_report_names_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    class Own(nn.Conv2d):
        pass

    with caplog.at_level(logging.INFO, logger="torchops"):
        torchops.convert(nn.Sequential(Own(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    assert caplog.messages == [
        "converted 1 layers (1 BatchNorm2d); fused 1 activations; "
        "left 1 layers of other classes (1 Own)"
    ]
