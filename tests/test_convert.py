"""torchops.convert and revert: what they change, what they leave, and that both can be undone."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchops
import torchops.nn as tnn
from torchops import _tolerance


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


class Activations(TorchDispatchMode):
    """Records torch's own activations while it is on: what was not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("relu", "leaky_relu", "gelu", "silu", "sigmoid"):
            self.names.append(name)
        return func(*args, **kwargs or {})


def left_to_torch(model: nn.Module, *inputs: Tensor) -> list[str]:
    with Activations() as activations:
        model(*inputs)
    return activations.names


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
    assert left_to_torch(model, input) == []


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() + 0.1


def test_a_parametrized_layer_is_reverted_and_its_copy_is_not() -> None:
    torch.manual_seed(0)
    reference = Net().double()
    model = torchops.convert(copy.deepcopy(reference))
    for net in (reference, model):
        for module in list(net.modules()):
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.utils.parametrize.register_parametrization(module, "weight", Positive())
    clone = copy.deepcopy(model)
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torchops.revert(model)
    assert repr(model) == repr(reference)
    assert not any(isinstance(module, tnn.Conv2d) for module in model.modules())
    assert isinstance(clone.stem[0], tnn.Conv2d)
    torch.testing.assert_close(model(input), reference(input))
    torch.testing.assert_close(clone(input), reference(input))
    for net in (reference, model):
        for module in list(net.modules()):
            if nn.utils.parametrize.is_parametrized(module):
                nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert {name: type(m) for name, m in model.named_modules()} == {
        name: type(m) for name, m in reference.named_modules()
    }


class Locked:
    """Has something that cannot be copied, and says how to do without."""

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, lock=threading.Lock())


class LockedSequential(Locked, nn.Sequential):
    pass


class LockedBlock(Locked, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_the_state_that_their_class_stores(copier) -> None:
    for model in LockedSequential(nn.BatchNorm2d(3), nn.ReLU()), LockedBlock():
        cls, model.lock = type(model), threading.Lock()
        copied = copier(torchops.convert(model))
        assert isinstance(copied, cls) and copied.lock is not model.lock
        assert type(copied) is type(model)
        input = torch.randn(2, 3, 4, 4)
        assert torch.equal(copied(input), model(input))


def test_torch_save_and_load() -> None:
    model = torchops.convert(Net())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    input = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(input), model.eval()(input))


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:DeprecationWarning")
def test_jit_script_compiles_torch_s_layers() -> None:
    torch.manual_seed(0)
    reference = Net().double().eval()
    model = torchops.convert(copy.deepcopy(reference))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.load(file)(input), reference(input))
    torch.testing.assert_close(model(input), reference(input))
    torch.testing.assert_close(torchops.revert(model)(input), reference(input))
    with pytest.raises(RuntimeError, match="with an activation"):
        torch.jit.script(nn.Sequential(tnn.BatchNorm2d(3, activation="relu")))


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
        "converted 1 layers (1 BatchNorm2d); fused 1 pairs of layers; "
        "left 1 layers of other classes (1 Own)"
    ]
