"""Every layer of torchops.nn beside its torch.nn twin: text, state, copies, pickles, results."""

import copy
import inspect
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchops.functional as TF
import torchops.nn as tnn


@dataclass
class Example:
    """Constructor arguments and the shape of an input."""

    args: tuple
    shape: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, cls):
        torch.manual_seed(5)
        return cls(*self.args, **self.kwargs).double()

    def input(self):
        generator = torch.Generator().manual_seed(6)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


PADDED = [
    Example((4, 6, 3), (2, 4, 9, 8), {"padding": 1, "padding_mode": mode})
    for mode in ("reflect", "replicate", "circular")
]
BATCH_NORMS = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}]

EXAMPLES = {
    "Conv1d": [Example((4, 6, 3), (2, 4, 9), {"padding": 1, "padding_mode": "circular"})],
    "Conv2d": [
        Example((4, 6, 3), (2, 4, 9, 8)),
        Example((4, 6, (3, 1)), (4, 9, 8), {"stride": 2, "groups": 2, "bias": False}),
        Example((4, 4, 3), (2, 4, 9, 8), {"padding": "same", "dilation": 2, "groups": 4}),
        *PADDED,
    ],
    "Conv3d": [Example((2, 3, 3), (1, 2, 5, 5, 5))],
    "LazyConv1d": [Example((6, 3), (2, 4, 9))],
    "LazyConv2d": [Example((6, 3), (2, 4, 9, 8), {"padding": 1})],
    "LazyConv3d": [Example((3, 3), (1, 2, 5, 5, 5))],
    "MaxPool1d": [Example((3,), (2, 4, 9), {"stride": 2, "padding": 1})],
    "MaxPool2d": [
        Example((3,), (2, 4, 9, 8), {"stride": 2, "padding": 1, "ceil_mode": True}),
        Example((2,), (2, 4, 9, 8), {"return_indices": True}),
    ],
    "MaxPool3d": [Example((2,), (1, 2, 5, 5, 5))],
    "AvgPool1d": [Example((3,), (2, 4, 9), {"stride": 2, "padding": 1})],
    "AvgPool2d": [Example((3, 2), (2, 4, 9, 8), {"padding": 1, "count_include_pad": False})],
    "AvgPool3d": [Example((2,), (1, 2, 5, 5, 5))],
    "AdaptiveAvgPool1d": [Example((5,), (2, 4, 9))],
    "AdaptiveAvgPool2d": [Example((1,), (2, 4, 9, 8)), Example(((None, 3),), (2, 4, 9, 8))],
    "AdaptiveAvgPool3d": [Example((2,), (1, 2, 5, 5, 5))],
    "AdaptiveMaxPool1d": [Example((5,), (2, 4, 9))],
    "AdaptiveMaxPool2d": [Example((3,), (2, 4, 9, 8), {"return_indices": True})],
    "AdaptiveMaxPool3d": [Example((2,), (1, 2, 5, 5, 5))],
    "BatchNorm1d": [Example((4,), (6, 4), k) for k in BATCH_NORMS] + [Example((4,), (6, 4, 5))],
    "BatchNorm2d": [Example((4,), (6, 4, 5, 3), k) for k in BATCH_NORMS],
    "BatchNorm3d": [Example((4,), (6, 4, 2, 3, 2), k) for k in BATCH_NORMS],
    "LazyBatchNorm1d": [Example((), (6, 4, 5))],
    "LazyBatchNorm2d": [Example((), (6, 4, 5, 3))],
    "LazyBatchNorm3d": [Example((), (6, 4, 2, 3, 2))],
    "SyncBatchNorm": [Example((4,), (6, 4, 5, 3))],
    "Conv1x1": [Example((4, 6), (2, 4, 5, 3)), Example((4, 6, 2, False), (2, 4, 5, 3))],
    "ChannelMaxPool": [Example((2,), (2, 7, 5, 3)), Example((3, 2), (2, 7, 5, 3))],
    "ChannelAvgPool": [Example((2,), (2, 7, 5, 3)), Example((3, 2), (2, 7, 5, 3))],
    "ConvBNAct": [Example((4, 6, 3), (2, 4, 5, 6), {"activation": a}) for a in ("relu", None)],
}

each_example = pytest.mark.parametrize(
    ("cls", "example"),
    [
        pytest.param(getattr(tnn, name), example, id=f"{name}-{example.args}{example.kwargs or ''}")
        for name in tnn.__all__
        for example in EXAMPLES.get(name, [])
    ],
)
each_twin = pytest.mark.parametrize(
    ("cls", "twin", "example"),
    [
        pytest.param(getattr(tnn, name), getattr(nn, name), example,
                     id=f"{name}-{example.args}{example.kwargs or ''}")
        for name in tnn.__all__
        if hasattr(nn, name)
        for example in EXAMPLES.get(name, [])
    ],
)  # fmt: skip

# 3-D layers run natively for now; here it matters that they are right, not who computes.
pytestmark = pytest.mark.filterwarnings("ignore::torchops.FallbackWarning")


def is_lazy(module):
    return isinstance(module, nn.modules.lazy.LazyModuleMixin)


def outputs(module, input):
    result = module(input)
    return result if isinstance(result, tuple) else (result,)


def training_step(module, input):
    """Outputs, every gradient, and the buffers afterwards."""
    input = input.clone().requires_grad_()
    result = outputs(module, input)
    loss = (result[0].sin() * result[0]).sum()
    gradients = torch.autograd.grad(loss, [input, *module.parameters()])
    return result, gradients, list(module.buffers())


@pytest.mark.parametrize("name", tnn.__all__)
def test_every_layer_has_an_example(name):
    assert EXAMPLES.get(name), f"add an example of {name} to EXAMPLES"


@each_twin
def test_is_its_twin(cls, twin, example):
    own, native = example.build(cls), example.build(twin)
    assert isinstance(own, twin)
    assert repr(own) == repr(native)
    assert own.extra_repr() == native.extra_repr()
    assert cls.__name__ == twin.__name__


@each_twin
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_step(cls, twin, example, training):
    own, native = example.build(cls).train(training), example.build(twin).train(training)
    input = example.input()
    if is_lazy(own):
        own(input), native(input)
        own.load_state_dict(native.state_dict())
    found = training_step(own, input), training_step(native, input)
    torch.testing.assert_close(*found)
    assert [t.stride() for t in found[0][0]] == [t.stride() for t in found[1][0]]


@each_twin
def test_channels_last_module(cls, twin, example):
    """`module.to(memory_format=...)` changes the weights' strides."""
    if len(example.shape) != 4:
        pytest.skip("channels_last is a format of 4-D inputs")
    own, native = example.build(cls), example.build(twin)
    input = example.input().contiguous(memory_format=torch.channels_last)
    if is_lazy(own):
        own(input), native(input)
        own.load_state_dict(native.state_dict())
    own, native = (module.to(memory_format=torch.channels_last) for module in (own, native))
    found = training_step(own, input), training_step(native, input)
    torch.testing.assert_close(*found)
    assert [t.stride() for t in found[0][0]] == [t.stride() for t in found[1][0]]


@each_twin
def test_state_dict_both_ways(cls, twin, example):
    own, native = example.build(cls), example.build(twin)
    if is_lazy(own):
        own(example.input()), native(example.input())
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(1)
    assert list(own.state_dict()) == list(native.state_dict())
    assert own.state_dict()._metadata == native.state_dict()._metadata
    native.load_state_dict(own.state_dict(), strict=True)
    torch.testing.assert_close(dict(native.state_dict()), dict(own.state_dict()))
    fresh = example.build(cls)
    fresh.load_state_dict(native.state_dict(), strict=True)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(native.state_dict()))


@each_twin
def test_load_state_dict_refuses_what_native_refuses(cls, twin, example):
    own, native = example.build(cls), example.build(twin)
    if not native.state_dict():
        pytest.skip("a layer without state")
    messages = []
    for module in (own, native):
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict({"unknown": torch.ones(1)}, strict=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_example
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies(cls, example, copied):
    module = example.build(cls).eval()
    if is_lazy(module):
        module(example.input())
    twin = copied(module)
    assert type(twin) is type(module)
    assert not twin.training
    assert repr(twin) == repr(module)
    input = example.input()
    assert all(map(torch.equal, outputs(twin, input), outputs(module, input)))
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert one.data_ptr() != other.data_ptr()


@each_twin
def test_lazy_layers_become_ours(cls, twin, example):
    own, native = example.build(cls), example.build(twin)
    if not is_lazy(own):
        pytest.skip("not lazy")
    own(example.input()), native(example.input())
    assert type(own) is getattr(tnn, type(native).__name__)
    assert isinstance(own, type(native))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(name):
    found = []
    for cls in (tnn.Conv2d, nn.Conv2d):
        torch.manual_seed(1)
        layer = getattr(nn.utils.parametrizations, name)(cls(4, 6, 3).double())
        found.append(training_step(layer, EXAMPLES["Conv2d"][0].input()))
    torch.testing.assert_close(*found)


def test_hooks_run():
    seen = []
    layer = tnn.MaxPool2d(2)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(torch.randn(1, 2, 4, 4, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_meta_device_gives_shapes_without_memory():
    with torch.device("meta"):
        layer = tnn.Conv2d(4, 6, 3)
        assert layer(torch.empty(2, 4, 9, 8)).shape == (2, 6, 7, 6)


def composed(cls, module):
    """What a layer without a twin stands for, out of torch.nn's functions."""
    functional = nn.functional
    if cls is tnn.Conv1x1:
        return lambda x: functional.conv2d(x, module.weight, module.bias, module.stride)
    if cls is tnn.ConvBNAct:
        bn = module.bn
        activate = {"relu": functional.relu, None: lambda x: x}[bn.activation]
        return lambda x: activate(
            functional.batch_norm(
                functional.conv2d(x, module.conv.weight, module.conv.bias),
                None, None, bn.weight, bn.bias, True,
            )
        )  # fmt: skip
    pool = functional.max_pool1d if cls is tnn.ChannelMaxPool else functional.avg_pool1d
    return lambda x: pool(x.flatten(2).mT, module.kernel_size, module.stride).mT.unflatten(
        2, x.shape[2:]
    )


@pytest.mark.parametrize(
    ("name", "example"),
    [
        pytest.param(name, example, id=f"{name}-{example.args}")
        for name in tnn.__all__
        if not hasattr(nn, name)
        for example in EXAMPLES.get(name, [])
    ],
)
def test_layers_without_a_twin(name, example):
    cls = getattr(tnn, name)
    module = example.build(cls)
    input = example.input().requires_grad_()
    leaves = [input, *module.parameters()]
    found = []
    for call in (module, composed(cls, module)):
        output = call(input)
        found.append((output, torch.autograd.grad(output.sin().sum(), leaves)))
    torch.testing.assert_close(*found)


@each_twin
def test_skip_init(cls, twin, example):
    lazy = issubclass(twin, nn.modules.lazy.LazyModuleMixin)
    if lazy or "device" not in inspect.signature(twin).parameters:
        pytest.skip("no parameters when it is built")
    own, native = (nn.utils.skip_init(c, *example.args, **example.kwargs) for c in (cls, twin))
    assert repr(own) == repr(native)


def test_batch_norm_takes_device_and_dtype_by_position():
    layer = tnn.BatchNorm2d(3, 1e-5, 0.1, True, True, "meta", torch.float64, activation="relu")
    assert layer.weight.is_meta and layer.weight.dtype is torch.float64


def test_avg_pool2d_writes_to_out_as_native_does():
    input, out = torch.randn(2, 3, 8, 8), torch.empty(2, 3, 4, 4)
    assert TF.avg_pool2d(input, 2, out=out) is out
    torch.testing.assert_close(out, F.avg_pool2d(input, 2))


def test_training_tells_autograd_that_the_running_statistics_changed():
    layer = tnn.BatchNorm2d(3)
    running = layer.running_mean, layer.running_var
    versions = [tensor._version for tensor in running]
    layer(torch.randn(2, 3, 4, 4))
    assert [tensor._version for tensor in running] == [version + 1 for version in versions]


def test_evaluation_then_training_then_one_backward():
    """The output in evaluation is of the statistics that were, whatever training made of them."""
    own, native = tnn.BatchNorm2d(3), nn.BatchNorm2d(3)
    input = torch.randn(4, 3, 5, 5)
    gradients = []
    for layer in own, native:
        leaf = input.clone().requires_grad_()
        evaluated = layer.eval()(leaf)
        statistics = layer.running_mean.clone(), layer.running_var.clone()
        trained = layer.train()(leaf + 1)
        assert not torch.equal(layer.running_mean, statistics[0])
        if layer is native:  # differentiates at the new ones: undone for what is compared
            layer.running_mean.data.copy_(statistics[0])
            layer.running_var.data.copy_(statistics[1])
        ((evaluated - trained) ** 2).sum().backward()
        gradients.append((leaf.grad, layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(*gradients)


def test_sync_batch_norm_is_recorded_as_torch_s_is():
    graph = torch.fx.symbolic_trace(nn.Sequential(tnn.SyncBatchNorm(3))).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


def test_convert_sync_batchnorm_keeps_activations():
    model = nn.Sequential(tnn.BatchNorm2d(3, activation="relu"), nn.BatchNorm2d(3))
    model[0].weight.data.uniform_()
    state = model.state_dict()
    converted = tnn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(layer) for layer in converted] == [tnn.SyncBatchNorm] * 2
    assert [layer.activation for layer in converted] == ["relu", None]
    torch.testing.assert_close(converted.state_dict(), state)
