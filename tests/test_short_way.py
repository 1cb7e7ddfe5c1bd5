"""Pool layers go straight to their Function in the commonest call, convolution and batch-norm in
evaluation straight to their kernel, batch-norm in training past two outputs; in all others they
must not."""

import importlib

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

import torchops
import torchops.nn as tnn
from torchops import _tuning
from torchops.ops import _drop_in

LAYERS = [("AvgPool2d", (2,)), ("MaxPool2d", (2,)), ("AdaptiveMaxPool2d", (3,))]


@pytest.fixture(params=LAYERS, ids=[name for name, _ in LAYERS])
def pair(request):
    name, args = request.param
    return getattr(tnn, name)(*args), getattr(nn, name)(*args)


@pytest.fixture
def input():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True)


def backward(layer, input):
    output = layer(input)
    return output, *torch.autograd.grad(output.square().sum(), input)


def calls_the_function(monkeypatch, layer):
    """A list that grows with every call of the operator's public function by the layer."""
    name = {"AvgPool2d": "avg_pool2d", "MaxPool2d": "max_pool2d"}.get(
        type(layer).__name__, "adaptive_max_pool2d"
    )
    module = __import__(type(layer).__module__, fromlist=[name])
    real, calls = getattr(module, name), []

    def record(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, record)
    return calls


def test_plain_training_goes_the_short_way(pair, input, monkeypatch):
    calls = calls_the_function(monkeypatch, pair[0])
    torch.testing.assert_close(backward(pair[0], input), backward(pair[1], input))
    assert calls == []
    with torch.no_grad():
        pair[0](input)
    assert len(calls) == 1


def test_transforms(pair, input):
    plain = input.detach()
    for transform in (
        lambda layer: jvp(layer, (plain,), (plain.cos(),)),
        lambda layer: vmap(layer)(torch.stack([plain, -plain])),
        lambda layer: grad(lambda x: layer(x).square().sum())(plain),
        # requires_grad outside of the transform
        lambda layer: grad(lambda w: (layer(input) * w).sum())(torch.tensor(2.0).double()),
        lambda layer: jvp(lambda x: layer(x * 2), (input,), (plain,)),
    ):
        ours, native = (transform(layer) for layer in pair)
        torch.testing.assert_close(ours, native)


def test_compile(pair, input):
    compiled = torch.compile(pair[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(backward(compiled, input), backward(pair[1], input))


def test_trace_records_operators(pair, input):
    traced = torch.jit.trace(pair[0], input)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(backward(traced, input), backward(pair[1], input))


def test_a_mode_sees_the_call(pair, input):
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    with Watch():
        pair[0](input)
    assert any("pool2d" in name for name in seen)


def test_native_words_for_what_is_refused(pair, input):
    for bad in (input[0, 0], input[:, :, :0]):
        with pytest.raises(Exception) as native:
            pair[1](bad)
        with torchops.backend("own"), pytest.raises(type(native.value)) as ours:
            pair[0](bad)
        assert str(ours.value) == str(native.value)


def test_numbers_that_are_no_bools_are_refused(input):
    with pytest.raises(TypeError):
        tnn.AvgPool2d(2, ceil_mode=1)(input)
    with pytest.raises(TypeError):
        tnn.MaxPool2d(2, ceil_mode=1)(input)


def test_the_modes_and_the_table_decide(pair, input, monkeypatch):
    calls = calls_the_function(monkeypatch, pair[0])
    with torchops.backend("native"):
        pair[0](input)
    assert len(calls) == 1
    debt = _tuning.Debt(calls[0], "cpu", "all", lambda *args, **kwargs: True, 2.0, "nowhere")
    monkeypatch.setattr(_drop_in._tuning, "DEBTS", _tuning.by_operator(debt))
    with torchops.backend("auto"):
        pair[0](input)
    assert len(calls) == 2


# ---- convolution, batch-norm and activation in evaluation ---------------------------------------


@pytest.fixture
def block():
    torch.manual_seed(4)
    block = tnn.ConvBNAct(3, 5, 3, padding=1).double()
    block(torch.randn(4, 3, 6, 5, dtype=torch.float64))  # running statistics of its own
    return block.eval()


@pytest.fixture
def long_way(monkeypatch):
    """A list that grows with every call of conv2d_bn_act by the layer."""
    module = importlib.import_module("torchops.nn.conv2d_bn_act")
    real, calls = module.conv2d_bn_act, []

    def record(*args, **kwargs):
        calls.append(args[0].dtype)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "conv2d_bn_act", record)
    return calls


def in_two_layers(block, input):
    return torch.relu(
        nn.functional.batch_norm(
            nn.functional.conv2d(input, block.conv.weight, block.conv.bias, padding=1),
            block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias,
        )
    )  # fmt: skip


def test_plain_inference_goes_the_short_way(block, input, long_way):
    with torch.no_grad():
        torch.testing.assert_close(block(input), in_two_layers(block, input))
    assert long_way == []


def test_inference_that_needs_more_goes_the_long_way(block, input, long_way):
    x = input.detach()
    with torch.no_grad():
        expected = in_two_layers(block, x)
        with torchops.backend("native"):
            torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(vmap(block)(x[None])[0], expected)
        ours, theirs = (
            jvp(f, (x,), (x.cos(),)) for f in (block, lambda x: in_two_layers(block, x))
        )
        torch.testing.assert_close(ours, theirs)
        assert len(long_way) == 3
        block.conv.stride = [1, 1]
        torch.testing.assert_close(block(x), expected)
        assert len(long_way) == 4
    output = block(input)
    torch.testing.assert_close(output, expected)
    assert output.requires_grad


def test_inference_under_autocast(block, input, long_way):
    block.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = block(input.detach().float())
    assert output.dtype is torch.bfloat16


def test_inference_refuses_in_native_words(block, input):
    bad = input.detach()[:, :2]
    with torch.no_grad(), pytest.raises(RuntimeError) as native:
        in_two_layers(block, bad)
    with torch.no_grad(), torchops.backend("own"), pytest.raises(RuntimeError) as ours:
        block(bad)
    assert str(ours.value) == str(native.value)


# ---- batch-norm in training ---------------------------------------------------------------------


def test_batch_norm_in_training_goes_the_short_way_where_the_input_requires_grad(input):
    short = "BatchNormBackwardOnly"
    norm = tnn.BatchNorm2d(3, activation="silu").double()
    gradients = {}
    for way, x in ((short, input), ("BatchNormAndUpdateFunction", input.detach())):
        output = norm(x)
        assert type(output.grad_fn).__name__.startswith(way)
        gradients[way] = torch.autograd.grad(output.square().sum(), list(norm.parameters()))
    torch.testing.assert_close(*gradients.values(), rtol=0, atol=0)
    norm.track_running_stats = False
    assert short not in type(norm(input).grad_fn).__name__
