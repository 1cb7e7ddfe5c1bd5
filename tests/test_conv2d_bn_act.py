"""conv2d_bn_act in evaluation is one operator with the bits, the strides, the derivatives and the
errors of conv2d and batch_norm one after the other."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jvp, vmap

import torchops.functional as TF
from fused_convolutions import CALLS, SMALL
from support import FORMATS
from torchops import _C, _tuning
from torchops.ops._activation import ACTIVATIONS
from torchops.ops.conv2d_bn_act import native_conv2d_bn_act

each_call = pytest.mark.parametrize("call", CALLS, ids=str)
each_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def two_calls(
    input, weight, gamma, beta, mean, var, *, bias, activation, residual, eps=1e-5, **window
):
    output = TF.conv2d(input, weight, bias, **window)
    return TF.batch_norm(
        output, mean, var, gamma, beta, eps=eps, activation=activation, residual=residual
    )


def assert_same(ours, expected):
    assert ours.dtype is expected.dtype
    assert ours.stride() == expected.stride()
    assert torch.equal(ours, expected)


@each_call
@each_format
@each_dtype
def test_bits_and_strides_of_two_calls(call, memory_format, dtype):
    arguments, options = call.arguments(dtype, memory_format)
    assert_same(TF.conv2d_bn_act(*arguments, **options), two_calls(*arguments, **options))


@each_call
@each_format
@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_every_isa(call, memory_format, isa):
    arguments, options = call.arguments(torch.float32, memory_format)
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        assert_same(TF.conv2d_bn_act(*arguments, **options), two_calls(*arguments, **options))
    finally:
        _C.set_cpu_isa(before)


@each_call
@each_format
def test_any_number_of_threads(call, memory_format):
    arguments, options = call.arguments(torch.float32, memory_format, images=24)
    torch.set_num_threads(1)
    expected = two_calls(*arguments, **options)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(TF.conv2d_bn_act(*arguments, **options), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@each_format
def test_every_activation(activation, residual, memory_format):
    arguments, options = CALLS[1].arguments(torch.float64, memory_format)
    options |= {"activation": activation, "residual": options["residual"] if residual else None}
    output = TF.conv2d_bn_act(*arguments, **options)
    assert_same(output, two_calls(*arguments, **options))
    torch.testing.assert_close(output, native_conv2d_bn_act(*arguments, **options))


def test_no_parameters_and_an_eps():
    (input, weight, _, _, mean, var), options = CALLS[0].arguments(
        torch.float32, torch.contiguous_format
    )
    options["eps"] = 0.1
    ours = TF.conv2d_bn_act(input, weight, None, None, mean, var, **options)
    assert_same(ours, two_calls(input, weight, None, None, mean, var, **options))


@each_format
def test_infinities_stay_in_their_windows(memory_format):
    """The 3x3 kernel recomputes what they reach; what is done must not be done twice."""
    arguments, options = CALLS[3].arguments(torch.float32, memory_format)
    arguments[0][0, 3, 5, 5] = torch.inf
    ours, expected = TF.conv2d_bn_act(*arguments, **options), two_calls(*arguments, **options)
    assert torch.equal(ours.isfinite(), expected.isfinite()) and not ours.isfinite().all()
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("call", SMALL, ids=str)
def test_derivatives_are_those_of_two_calls(call):
    arguments, options = call.arguments(torch.float64, torch.contiguous_format)
    leaves = [tensor.requires_grad_(index < 4) for index, tensor in enumerate(arguments)]
    ours = torch.autograd.grad(TF.conv2d_bn_act(*leaves, **options).sum(), leaves[:4])
    theirs = torch.autograd.grad(two_calls(*leaves, **options).sum(), leaves[:4])
    assert all(map(torch.equal, ours, theirs))
    tangents = tuple(torch.randn_like(tensor) for tensor in arguments[:4])
    primals = tuple(tensor.detach() for tensor in arguments[:4])

    def of(function):
        return lambda *tensors: function(*tensors, *arguments[4:], **options)

    assert all(
        map(
            torch.equal,
            jvp(of(TF.conv2d_bn_act), primals, tangents),
            jvp(of(two_calls), primals, tangents),
        )
    )


@pytest.mark.parametrize("call", SMALL, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_over_everything(call, compiled):
    arguments, options = call.arguments(torch.float64, torch.contiguous_format)
    residual = options.pop("residual")
    tensors = [*arguments, torch.zeros(1) if residual is None else residual]
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in tensors]

    def own(*tensors):
        rest = {"residual": None if residual is None else tensors[-1], **options}
        return TF.conv2d_bn_act(*tensors[:-1], **rest)

    mapped = (
        torch.compile(vmap(own), fullgraph=True, backend="aot_eager") if compiled else vmap(own)
    )
    expected = torch.stack([own(*(tensor[i] for tensor in stacked)) for i in range(2)])
    torch.testing.assert_close(mapped(*stacked), expected)


@pytest.mark.parametrize(
    ("position", "shape"), [(1, (3, 5, 2, 2)), (2, (4,)), (3, (2,)), (4, (4,)), (5, (1,))]
)
def test_errors_are_those_of_torch(position, shape):
    arguments, options = SMALL[0].arguments(torch.float32, torch.contiguous_format)
    arguments[position] = torch.ones(shape)
    raised = []
    for function in (native_conv2d_bn_act, TF.conv2d_bn_act):
        with pytest.raises(Exception) as error:
            function(*arguments, **options)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("residual", [torch.ones(2, 3, 3, 1), torch.ones(2, 3, 3, 2).double()])
def test_a_residual_unlike_the_output(residual):
    arguments, options = SMALL[0].arguments(torch.float32, torch.contiguous_format)
    with pytest.raises(RuntimeError, match="residual should have the (shape|dtype) of input"):
        TF.conv2d_bn_act(*arguments, **{**options, "residual": residual})


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "tanh"},
        {"stride": True},
        {"groups": True},
        {"padding": "full"},
    ],
    ids=str,
)
def test_bad_options_are_refused_as_by_torch(change):
    arguments, options = SMALL[0].arguments(torch.float32, torch.contiguous_format)
    raised = []
    for function in (native_conv2d_bn_act, TF.conv2d_bn_act):
        with pytest.raises(Exception) as error:
            function(*arguments, **{**options, **change})
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_auto_keeps_to_the_tuning_table_of_conv2d(monkeypatch):
    def everything(*args, **kwargs):
        return True

    debt = _tuning.Debt("conv2d", "cpu", "all", everything, 2.0, "nowhere")
    monkeypatch.setattr(_tuning, "DEBTS", _tuning.by_operator(debt))
    arguments, options = SMALL[0].arguments(torch.float32, torch.contiguous_format)
    import torchops

    with torchops.backend("auto"), torch.profiler.profile() as profile:
        TF.conv2d_bn_act(*arguments, **options)
    names = {event.key for event in profile.key_averages()}
    assert "aten::conv2d" in names and "torchops::batch_norm_apply" in names
    assert "torchops::conv2d_bn_act" not in names


def test_a_module_under_functional_call():
    import torchops.nn as tnn

    module = tnn.ConvBNAct(3, 4, 3).double().eval()
    input = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad():
        assert torch.equal(functional_call(module, parameters, (input,)), module(input))
