"""PyTorch's own tables of operators and modules, re-pointed at torchops.

op_db, module_db and common_nn ship in torch's wheel: sample inputs, error inputs, and which
derivatives each entry supports. Entries keep their names; only what they call is ours.
"""

import copy
import itertools
import re
import types

import pytest
import torch

pytest.importorskip("expecttest", reason="torch's tables need the package expecttest")

from torch.testing._internal import common_nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import gradcheck, gradgradcheck

import torchops.functional as TF
import torchops.nn as tnn
from torchops._tolerance import ULPS, assert_close
from torchops.ops._drop_in import OPERATORS

NATIVE = pytest.mark.skip(reason="torch computes this operator for now; see torchops info")


def own_entry(info):
    name = info.name.removeprefix("nn.functional.")
    entry = copy.copy(info)
    entry.op, entry.native = getattr(TF, name), info.op
    marks = [] if OPERATORS[name].own else [NATIVE]
    return pytest.param(entry, id=name, marks=marks)


OPS = [
    own_entry(info)
    for info in op_db
    if info.name.startswith("nn.functional.")
    and hasattr(TF, info.name.removeprefix("nn.functional."))
    and torch.float64 in info.dtypes
]
each_op = pytest.mark.parametrize("op", OPS)


def tensors_of(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def outcome(call):
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def apply(function, sample):
    return tensors_of(function(sample.input, *sample.args, **sample.kwargs))


def in_double(sample):
    return sample.transform(
        lambda value: (
            value.double()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )
    )


def assert_as_native(op, sample, dtype):
    own = apply(op.op, in_fresh_tensors(sample))
    exact = apply(op.native, in_double(in_fresh_tensors(sample)))
    # torch's bfloat16 convolution on the CPU crashes for some shapes
    survives = not (dtype is torch.bfloat16 and "conv" in op.name)
    native = apply(op.native, in_fresh_tensors(sample)) if survives else [None] * len(own)
    for ours, expected, theirs in zip(own, exact, native, strict=True):
        if ours.is_floating_point():
            assert_close(ours, expected, theirs)
        else:
            assert torch.equal(ours, expected)
        if theirs is not None:
            assert ours.stride() == theirs.stride()


def in_fresh_tensors(sample):
    """Copies with the same strides: batch_norm updates its running statistics in place."""
    return sample.transform(
        lambda value: (
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            if isinstance(value, torch.Tensor)
            else value
        )
    )


@each_op
@pytest.mark.parametrize("dtype", ULPS, ids=lambda dtype: str(dtype)[6:])
def test_sample_inputs(op, dtype):
    for sample in op.sample_inputs("cpu", dtype):
        assert_as_native(op, sample, dtype)


@each_op
def test_noncontiguous_sample_inputs(op):
    for sample in op.sample_inputs("cpu", torch.float32):
        assert_as_native(op, sample.noncontiguous(), torch.float32)


@each_op
@pytest.mark.filterwarnings("ignore::torchops.FallbackWarning")
def test_dtypes_that_native_takes_and_no_kernel_here_does(op):
    for dtype in op.dtypes - set(ULPS):
        for sample in itertools.islice(op.sample_inputs("cpu", dtype), 5):
            for ours, theirs in zip(apply(op.op, sample), apply(op.native, sample), strict=True):
                assert torch.equal(ours, theirs), dtype


@each_op
def test_error_inputs(op):
    if op.error_inputs_func is None:
        pytest.skip("the table lists no error inputs")
    for error in op.error_inputs("cpu"):
        sample = error.sample_input
        own = outcome(lambda: apply(op.op, sample))  # noqa: B023
        assert own == outcome(lambda: apply(op.native, sample))  # noqa: B023
        assert own[0] is error.error_type


def differentiable_call(op, sample):
    """The sample as a function of its tensors that require grad, on copies of the others."""
    where = [
        i
        for i, a in enumerate((sample.input, *sample.args))
        if isinstance(a, torch.Tensor) and a.requires_grad
    ]
    keys = [k for k, a in sample.kwargs.items() if isinstance(a, torch.Tensor) and a.requires_grad]

    def call(*inputs):
        arguments = [
            a.clone() if isinstance(a, torch.Tensor) and not a.requires_grad else a
            for a in (sample.input, *sample.args)
        ]
        for position, input in zip(where, inputs, strict=False):
            arguments[position] = input
        named = dict(zip(keys, inputs[len(where) :], strict=True))
        outputs = tensors_of(op.op(*arguments, **{**sample.kwargs, **named}))
        return tuple(output for output in outputs if output.is_floating_point())

    arguments = (sample.input, *sample.args)
    return call, [*(arguments[i] for i in where), *(sample.kwargs[k] for k in keys)]


@each_op
def test_gradcheck(op):
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        call, inputs = differentiable_call(op, sample)
        gradcheck(
            call,
            inputs,
            check_forward_ad=op.supports_forward_ad,
            check_batched_grad=op.check_batched_grad,
            check_batched_forward_grad=op.check_batched_forward_grad,
            fast_mode=True,
        )


@each_op
def test_gradgradcheck(op):
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        call, inputs = differentiable_call(op, sample)
        gradgradcheck(
            call,
            inputs,
            gen_non_contig_grad_outputs=True,
            check_fwd_over_rev=op.supports_fwgrad_bwgrad,
            check_batched_grad=op.check_batched_gradgrad,
            fast_mode=True,
        )


# ---- module_db ----------------------------------------------------------------------------


def function_of(module_class):
    """LazyConv2d -> conv2d"""
    words = re.findall("[A-Z][a-z0-9]*", module_class.__name__.removeprefix("Lazy"))
    return "_".join(words).lower()


def own_module_entry(info):
    entry = copy.copy(info)
    entry.native, entry.module_cls = info.module_cls, getattr(tnn, info.module_cls.__name__)
    operator = OPERATORS.get(function_of(info.module_cls))
    marks = [NATIVE] if operator and not operator.own else []
    return pytest.param(entry, id=info.module_cls.__name__, marks=marks)


MODULES = [
    own_module_entry(info)
    for info in module_db
    if info.module_cls.__module__.startswith("torch.nn.modules.")
    and hasattr(tnn, info.module_cls.__name__)
]
each_module = pytest.mark.parametrize("info", MODULES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def module_inputs(info, training):
    return info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )


def build(cls, constructor_input):
    """A module of either class with the same parameters."""
    torch.manual_seed(3)
    return cls(*constructor_input.args, **constructor_input.kwargs).double()


def assert_same_training_step(own, native, args, kwargs):
    """Outputs, gradients of parameters and inputs, and buffers after the step."""
    found = []
    for module in (own, native):
        inputs = [a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) else a
                  for a in args]  # fmt: skip
        outputs = tensors_of(module(*inputs, **kwargs))
        loss = sum((o.sin() * o).sum() for o in outputs if o.is_floating_point())
        leaves = [*module.parameters(), *(i for i in inputs if isinstance(i, torch.Tensor))]
        found.append((outputs, torch.autograd.grad(loss, leaves), list(module.buffers())))
    torch.testing.assert_close(*found)
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert ours.stride() == theirs.stride()


@each_module
@each_mode
def test_module_inputs(info, training):
    for example in module_inputs(info, training):
        own, native = (
            build(cls, example.constructor_input) for cls in (info.module_cls, info.native)
        )
        own.train(training), native.train(training)
        args, kwargs = example.forward_input.args, example.forward_input.kwargs
        if info.is_lazy:
            own(*args, **kwargs), native(*args, **kwargs)
            own.load_state_dict(native.state_dict())
        if example.reference_fn is not None:
            with torch.no_grad():
                expected = example.reference_fn(own, *args, **kwargs)
                torch.testing.assert_close(own(*args, **kwargs), expected)
        assert_same_training_step(own, native, args, kwargs)


@each_module
@each_mode
def test_module_gradients(info, training):
    for example in module_inputs(info, training):
        module = build(info.module_cls, example.constructor_input).train(training)
        args, kwargs = example.forward_input.args, example.forward_input.kwargs
        if info.is_lazy:
            with torch.no_grad():
                module(*args, **kwargs)
        names = [name for name, _ in module.named_parameters()]

        def call(*tensors, module=module, names=names, args=args, kwargs=kwargs):
            state = dict(zip(names, tensors[len(args) :], strict=True))
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            outputs = torch.func.functional_call(
                module, {**state, **buffers}, tensors[: len(args)], kwargs
            )
            return tuple(o for o in tensors_of(outputs) if o.is_floating_point())

        inputs = (*args, *module.parameters())
        assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
        if info.supports_gradgrad:
            assert gradgradcheck(call, inputs, fast_mode=True)


@each_module
@each_mode
def test_module_error_inputs(info, training):
    if info.module_error_inputs_func is None:
        pytest.skip("the table lists no error inputs")
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
    )
    for error in errors:
        example = error.module_error_input
        found = []
        for cls in (info.module_cls, info.native):
            if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                found.append(outcome(lambda: build(cls, example.constructor_input)))  # noqa: B023
                continue
            module = build(cls, example.constructor_input)
            given = example.forward_input
            found.append(outcome(lambda: module(*given.args, **given.kwargs)))  # noqa: B023
        assert found[0] == found[1]
        assert found[0][0] is error.error_type


# ---- common_nn: what is left of it -----------------------------------------------------------


class OurModules(types.ModuleType):
    """torch.nn with our classes in place of theirs."""

    def __getattr__(self, name):
        return getattr(tnn if hasattr(tnn, name) else torch.nn, name)


def class_name(entry):
    """What an entry builds; entries with a constructor say it in their full name."""
    return entry.get("module_name") or entry.get("fullname", "").split("_")[0]


LEGACY = [
    pytest.param(entry, id=entry.get("fullname") or f"{class_name(entry)}-{entry.get('desc', '')}")
    for entry in [*common_nn.module_tests, *common_nn.get_new_module_tests()]
    if class_name(entry) in tnn.__all__ and "3d" not in class_name(entry)
]


def build_legacy(entry):
    torch.manual_seed(3)
    if "constructor" in entry:
        return entry["constructor"]().double()
    arguments = entry.get("constructor_args", ())
    return getattr(common_nn.nn, entry["module_name"])(*arguments).double()


@pytest.mark.parametrize("entry", LEGACY)
def test_common_nn(entry, monkeypatch):
    native = build_legacy(entry)
    monkeypatch.setattr(common_nn, "nn", OurModules("nn"))
    own = build_legacy(entry)
    assert type(own).__module__.startswith("torchops.nn.")
    input = torch.randn(entry["input_size"], dtype=torch.float64) if "input_size" in entry else (
        entry["input_fn"]().double()
    )  # fmt: skip
    assert_same_training_step(own, native, (input,), {})
    if entry.get("check_with_channels_last"):
        last = input.contiguous(memory_format=torch.channels_last)
        assert_same_training_step(own, native, (last,), {})
    gradcheck(own, (input.requires_grad_(),), fast_mode=True)
    gradgradcheck(own, (input,), fast_mode=True)


def test_the_tables_cover_what_they_should():
    """An entry that a later torch renames must not silently drop out."""
    known = {info.name.removeprefix("nn.functional.") for info in op_db}
    assert {name for name in TF.__all__ if name in known} == {param.id for param in OPS}
    assert {name for name in TF.__all__ if hasattr(torch.nn.functional, name)} <= known
    modules = {info.module_cls.__name__ for info in module_db}
    assert {name for name in tnn.__all__ if name in modules} == {param.id for param in MODULES}
