"""What torchops.convert folds, and that it stays right whatever is done to the model later."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import torchops
from test_convert import Net, assert_same_training_step, left_to_torch


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.bn_method = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)), inplace=True)
        return self.bn_method(x).sigmoid()


def test_every_activation_of_the_net_is_fused() -> None:
    input = torch.randn(2, 3, 16, 16)
    assert left_to_torch(torchops.convert(Net()), input) == []
    assert len(left_to_torch(torchops.convert(Net(), fuse=False), input)) == 5


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


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 3, 1), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.training else x

    def doubled(self, x: Tensor) -> Tensor:
        return self.forward(x)


class ReadsAFlagBelow(Deciding):
    def __init__(self) -> None:
        super().__init__()
        self.options = Options()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) * self.options.scale


class CallsAMethodBelow(ReadsAFlagBelow):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.options.doubled(x)))


class CallsForward(ReadsAFlagBelow):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.options.forward(x)))


class Freezes(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eval()
        return F.relu(self.bn(x))


class NamesItLikeAFunction(Deciding):
    def __init__(self) -> None:
        super().__init__()
        self.Tensor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x)) * self.Tensor


class ReachesBelow(Deciding):
    """Its list may get longer, or shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return F.relu(self.bn(x))


class LooksAtIdentity(Deciding):
    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        out = F.relu(self.bn(y))
        return out + 1 if y is x else out


class LooksAtIds(LooksAtIdentity):
    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        out = F.relu(self.bn(y))
        return out + 1 if id(y) == id(x) else out


class AsksTorch(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(x))
        return 2 * out if torch.is_inference_mode_enabled() else out


class AsksABackend(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(x))
        return 2 * out if torch.backends.cudnn.enabled else out


class Imports(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        import time

        out = F.relu(self.bn(x))
        return 2 * out if time.time() > 0 else out


class PicklesItself(Deciding):
    def __reduce_ex__(self, protocol: object) -> object:
        return type(self), ()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class HasADefault(Deciding):
    scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(x))
        return x if self.scale is None else x * self.scale


@pytest.mark.parametrize(
    "block", [ReadsFlag, ReadsMode, Counts, Gambles, Looks, LooksAtTheClass, WithoutGradients,
     ReadsAFlagBelow, CallsAMethodBelow, CallsForward, Freezes, NamesItLikeAFunction, ReachesBelow,
     LooksAtIdentity, LooksAtIds, AsksTorch, AsksABackend, Imports, PicklesItself, HasADefault],
)  # fmt: skip
def test_a_forward_that_decides_is_left_as_it_is(block: type[nn.Module]) -> None:
    assert type(torchops.convert(block())) is block


class Ends(Deciding):
    """What decides nothing though it looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Identity()  # torch.nn has a module of this name

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = torch.cat([F.relu(self.bn(x)), F.hardsigmoid(self.attention(x))], 1)
        return x if more is None else x + more


def test_a_forward_that_decides_nothing_is_fused() -> None:
    block = Ends().double()
    fused = torchops.convert(copy.deepcopy(block))
    assert type(fused) is not Ends and isinstance(fused, Ends)
    assert_same_training_step(fused, block, torch.randn(2, 3, 5, 5).double())


class MayScale(Deciding):
    def __init__(self) -> None:
        super().__init__()
        self.scale: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(x))
        return x if self.scale is None else x * self.scale


def test_an_attribute_that_was_none_counts_when_it_is_set() -> None:
    reference = MayScale()
    model = torchops.convert(copy.deepcopy(reference))
    x = torch.randn(2, 3, 4, 4)
    assert left_to_torch(model, x) == []
    reference.scale = model.scale = 3.0
    torch.testing.assert_close(model(x), reference(x))


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


def test_symbolic_trace_keeps_mode_and_statistics() -> None:
    torch.manual_seed(0)
    reference = Net().double()
    model = torch.fx.symbolic_trace(torchops.convert(copy.deepcopy(reference)))
    input = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same_training_step(model, reference, input)
    assert_same_training_step(model.eval(), reference.eval(), input)


def test_models_that_are_alike_are_of_one_class() -> None:
    models = [torchops.convert(Block()).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    input = torch.randn(2, 3, 4, 4)
    outputs = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (input,)))(
        parameters, buffers
    )
    torch.testing.assert_close(outputs, torch.stack([model(input) for model in models]))
