"""torchops.convert and revert: what they change, what they leave, and that both can be undone."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.fx
import torch.nn.functional as F
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


def test_every_activation_of_the_net_is_fused() -> None:
    input = torch.randn(2, 3, 16, 16)
    assert left_to_torch(torchops.convert(Net()), input) == []
    assert len(left_to_torch(torchops.convert(Net(), fuse=False), input)) == 5


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
    output = model(torch.randn(2, 3, 4, 4))
    assert (seen[0] < 0).any() == (watched == 0)
    assert (output >= 0).all()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.shortcut = nn.BatchNorm2d(3), nn.ReLU(), None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.act(out)


def pair_of_blocks() -> tuple[nn.Module, nn.Module]:
    """Native and converted: a batch-norm and an activation in a Sequential and in a block."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), Block()).eval()
    for batch_norm in (reference[0][0], reference[1].bn):
        nn.init.normal_(batch_norm.weight), nn.init.normal_(batch_norm.bias)
    model = torchops.convert(copy.deepcopy(reference))
    assert left_to_torch(model, torch.randn(2, 3, 4, 4)) == []
    return reference, model


@pytest.mark.parametrize("target", ["0.0", "0.1", "1.bn", "1.act"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_hook_that_comes_later_sees_what_it_would_see(target: str, register: str) -> None:
    input, found = torch.randn(2, 3, 4, 4, requires_grad=True), []
    for model in pair_of_blocks():
        seen: list[Tensor] = []
        hook = getattr(model.get_submodule(target), register)
        hook(lambda module, *values, seen=seen: seen.append(values[-1]))
        model(input).sum().backward()
        (values,) = seen
        found.append(values[0] if isinstance(values, tuple) else values)
    torch.testing.assert_close(*found)


def test_a_hook_on_all_modules_sees_the_activations() -> None:
    _, model = pair_of_blocks()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    with handle:
        model(torch.randn(2, 3, 4, 4))
    assert seen.count(nn.ReLU) == 2


@pytest.mark.parametrize(
    ("target", "other"),
    [
        ("0.0", nn.Identity()),
        ("0.0", nn.InstanceNorm2d(3)),
        ("0.1", nn.Tanh()),
        ("1.bn", nn.InstanceNorm2d(3)),
        ("1.act", nn.Tanh()),
        ("1.act", nn.SiLU()),
        ("1.shortcut", nn.Tanh()),
    ],
)
def test_a_layer_that_is_exchanged_later_counts(target: str, other: nn.Module) -> None:
    reference, model = pair_of_blocks()
    for net in (reference, model):
        parent, _, name = target.rpartition(".")
        setattr(net.get_submodule(parent), name, other)
    input = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(input), reference(input))


def test_sync_batch_norm_keeps_the_activations() -> None:
    reference, model = map(nn.SyncBatchNorm.convert_sync_batchnorm, pair_of_blocks())
    input = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(input), reference(input))


def test_layers_called_by_themselves_are_themselves() -> None:
    reference, model = pair_of_blocks()
    input = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model[0][0](input), reference[0][0](input))
    torch.testing.assert_close(model[0][:1](input), reference[0][:1](input))
    torch.testing.assert_close(model[1].bn(input), reference[1].bn(input))


def test_fx_records_the_layers_as_they_are() -> None:
    reference, model = pair_of_blocks()
    graphs = []
    for net in (reference, model):
        tracer = torch.fx.Tracer()
        tracer.is_leaf_module = lambda m, name: not list(m.children())  # type: ignore[method-assign]
        graphs.append([(node.op, str(node.target)) for node in tracer.trace(net).nodes])
    assert graphs[0] == graphs[1]


def test_a_batch_norm_with_two_places_gets_the_activation_of_each() -> None:
    shared = nn.BatchNorm2d(3)
    reference = nn.Sequential(
        nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Sigmoid()), shared
    ).double()
    model = torchops.convert(copy.deepcopy(reference))
    input = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(input), reference(input))
    assert left_to_torch(model, input) == []


def test_unlike_activations_are_not_fused() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.BatchNorm2d(3), nn.GELU(approximate="tanh"),
        nn.BatchNorm2d(3), nn.LeakyReLU(), nn.BatchNorm2d(3), nn.Dropout(),
    )  # fmt: skip
    torchops.convert(model)
    assert left_to_torch(model, torch.randn(2, 3, 4, 4)) == ["leaky_relu", "gelu"]


def test_functional_and_method_forms() -> None:
    torch.manual_seed(0)
    reference = Functional().double()
    model = torchops.convert(copy.deepcopy(reference))
    input = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_same_training_step(model, reference, input)
    assert left_to_torch(model, input) == []


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


class LooksAtTheClass(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            x = x.abs()
        return F.relu(self.bn(x))


class WithoutGradients(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.bn(x)
        return F.relu(x)


@pytest.mark.parametrize(
    "block", [ReadsFlag, ReadsMode, Counts, Gambles, Looks, LooksAtTheClass, WithoutGradients]
)
def test_a_forward_that_decides_is_left_as_it_is(block: type[nn.Module]) -> None:
    assert type(torchops.convert(block())) is block


class Skips(Deciding):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.bn(x)
        if skip is not None:
            x = x + skip
        return F.relu(x)


class AddsNumber(Deciding):
    def forward(self, x: Tensor, shift: float) -> Tensor:
        return F.relu(self.bn(x) + shift)


@pytest.mark.parametrize(
    ("block", "more"),
    [
        (Skips, ()),
        (Skips, (None,)),
        (Skips, (torch.ones(2, 3, 4, 4),)),
        (AddsNumber, (0.5,)),
        (AddsNumber, (torch.tensor(0.5),)),
    ],
)
def test_arguments_that_a_recording_takes_for_tensors(block: type[nn.Module], more: tuple) -> None:
    reference = block()
    model = torchops.convert(copy.deepcopy(reference))
    assert type(model) is not block
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x, *more), reference(x, *more))


class Broadcasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return F.relu(self.bn(x) + shift)


def test_a_broadcast_add_keeps_its_numbers() -> None:
    reference = Broadcasts().double()
    model = torchops.convert(copy.deepcopy(reference))
    assert type(model) is not Broadcasts
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
    assert left_to_torch(model, input) == []


def test_symbolic_trace_keeps_mode_and_statistics() -> None:
    torch.manual_seed(0)
    reference = Net().double()
    model = torch.fx.symbolic_trace(torchops.convert(copy.deepcopy(reference)))
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same_training_step(model, reference, input)
    assert_same_training_step(model.eval(), reference.eval(), input)


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


def test_models_that_are_alike_are_of_one_class() -> None:
    models = [torchops.convert(Block()).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    input = torch.randn(2, 3, 4, 4)
    outputs = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (input,)))(
        parameters, buffers
    )
    torch.testing.assert_close(outputs, torch.stack([model(input) for model in models]))


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
