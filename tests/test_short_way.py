"""Pool layers go straight to their Function in the commonest call; in all others they must not."""

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
    monkeypatch.setattr(_drop_in._tuning, "DEBTS", (debt,))
    with torchops.backend("auto"):
        pair[0](input)
    assert len(calls) == 2
