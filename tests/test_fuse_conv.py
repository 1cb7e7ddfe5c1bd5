"""In evaluation convert also folds a batch-norm into the convolution before it."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchops
from test_convert import BasicBlock


class Calls(TorchDispatchMode):
    """Counts the operators called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
        BasicBlock(8),
        BasicBlock(8, nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))),
        torchops.nn.ConvBNAct(8, 6, 1, activation="silu"),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


INPUT = torch.randn(2, 3, 19, 17, generator=torch.Generator().manual_seed(1))


def test_every_convolution_is_one_call_with_the_bits_of_two() -> None:
    apart = torchops.convert(net(), fuse=False)
    apart[7].conv.register_forward_hook(lambda *_: None)
    with torch.no_grad(), Calls() as calls:
        expected = apart(INPUT)
    assert calls.names["conv2d"] == calls.names["batch_norm_apply"] == 8
    model = torchops.convert(net())
    with torch.no_grad(), Calls() as calls:
        output = model(INPUT)
    assert calls.names == {"conv2d_bn_act": 8}
    assert torch.equal(output, expected)
    torch.testing.assert_close(output, _native(net())(INPUT))


def _native(model: nn.Sequential) -> nn.Sequential:
    block = model[7]
    model[7] = nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU()).eval()
    model[7][0].load_state_dict(block.conv.state_dict())
    model[7][1].load_state_dict(block.bn.state_dict())
    return model


def test_gradients_in_evaluation_are_those_of_the_layers() -> None:
    model, apart = torchops.convert(net()), torchops.convert(net(), fuse=False)
    found = []
    for each in (model, apart):
        input = INPUT.clone().requires_grad_()
        each(input).sin().sum().backward()
        found.append([input.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_still_let_the_gradient_through() -> None:
    model = torchops.convert(net()).requires_grad_(False)
    with Calls() as calls:
        model(INPUT)
    assert calls.names["conv2d_bn_act"] == 8
    input = INPUT.clone().requires_grad_()
    model(input).sum().backward()
    assert input.grad.abs().sum() > 0


def test_training_mode_trains() -> None:
    model, reference = torchops.convert(net()).train(), _native(net()).train()
    for each in (model, reference):
        with torch.no_grad():
            each(INPUT)
    torch.testing.assert_close(model[1].running_mean, reference[1].running_mean)
    torch.testing.assert_close(model[5].bn2.running_var, reference[5].bn2.running_var)
    assert model[4].num_batches_tracked == 1


@pytest.mark.parametrize("target", ["0", "1", "3", "5.conv1", "5.bn2", "6.downsample.0", "7.conv"])
def test_a_hook_on_either_layer_sees_what_it_would_see(target: str) -> None:
    found = []
    for model in (torchops.convert(net()), torchops.convert(net(), fuse=False)):
        seen: list[Tensor] = []
        layer = model.get_submodule(target)
        layer.register_forward_hook(lambda *values, seen=seen: seen.append(values[-1].clone()))
        with torch.no_grad():
            model(INPUT)
        found.append(*seen)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("target", "other"),
    [
        ("0", nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")),
        ("3", nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())),
        ("5.conv2", nn.Identity()),
        ("5.bn2", nn.BatchNorm2d(8, track_running_stats=False)),
        ("1", nn.InstanceNorm2d(8)),
        ("2", nn.Tanh()),
    ],
)
def test_a_layer_that_is_exchanged_later_counts(target: str, other: nn.Module) -> None:
    model, reference = torchops.convert(net()), _native(net())
    for each in (model, reference):
        parent, _, name = target.rpartition(".")
        setattr(each.get_submodule(parent), name, copy.deepcopy(other).eval())
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT), reference(INPUT))


class Mutating(nn.Module):
    """What the convolution reads is changed before its batch-norm is added to anything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.inplace, self.relu = nn.SELU(inplace=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        return self.relu(out + self.inplace(x))


class Broadcast(Mutating):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


class Unbatched(Mutating):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x[0])))


@pytest.mark.parametrize("block", [Mutating, Broadcast])
def test_blocks_where_one_call_would_be_wrong(block: type[nn.Module]) -> None:
    torch.manual_seed(0)
    reference = block().eval()
    nn.init.normal_(reference.bn.running_mean)
    model = torchops.convert(copy.deepcopy(reference))
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT.clone()), reference(INPUT.clone()))


def test_an_image_without_a_batch_is_refused_as_by_torch() -> None:
    texts = []
    for model in (Unbatched().eval(), torchops.convert(Unbatched().eval())):
        with torch.no_grad(), pytest.raises(ValueError) as error:
            model(INPUT)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    model = torchops.convert(net())
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert torch.equal(compiled(INPUT), model(INPUT))
    expected = torch.autograd.grad(model(INPUT).sum(), model[0].weight)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(INPUT).sum(), model[0].weight), expected
    )


def test_autocast_casts_the_convolution_alone() -> None:
    model, apart = torchops.convert(net()), torchops.convert(net(), fuse=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(INPUT)
        assert output.dtype is torch.bfloat16
        torch.testing.assert_close(output, apart(INPUT), rtol=0.02, atol=0.02)


def test_transforms_see_the_layers() -> None:
    model = torchops.convert(net()).double()
    input = INPUT.double()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(input[:, None]).flatten(0, 1), model(input))
        tangent = torch.randn_like(input)
        _, ours = torch.func.jvp(model, (input,), (tangent,))
        _, theirs = torch.func.jvp(_native(net()).double(), (input,), (tangent,))
    torch.testing.assert_close(ours, theirs)


def test_revert_brings_the_layers_back() -> None:
    model = torchops.revert(torchops.convert(net()))
    with torch.no_grad(), Calls() as calls:
        model(INPUT)
    assert calls.names["convolution"] == 7
