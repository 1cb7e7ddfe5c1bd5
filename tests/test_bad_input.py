"""Calls that native refuses get native's exception; raw operators refuse nonsense, and live."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

import torchops
import torchops.functional as TF
from raw_calls import OPERATORS, raw_calls
from support import CASES


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("case", "bad"),
    [pytest.param(c, bad, id=f"{c.name}-{bad.name}") for c in CASES for bad in c.bad_inputs],
)
def test_exception_is_natives(case, bad):
    assert raised(lambda: bad.call(case.own)) == raised(lambda: bad.call(case.native))


def on_meta(function):
    """`function` of the same call on meta tensors, which have sizes and no numbers."""

    def call(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("case", "bad"),
    [pytest.param(c, bad, id=f"{c.name}-{bad.name}") for c in CASES for bad in c.bad_inputs],
)
def test_exception_on_meta_tensors(case, bad):
    """Fake kernels refuse what kernels refuse: torch.compile and a model on meta say it early.

    With native's exception, where native's meta kernels refuse it, which check less than its CPU's.
    """
    own = raised(lambda: bad.call(on_meta(case.own)))
    try:
        bad.call(on_meta(case.native))
    except Exception as native:
        assert own == (type(native), str(native))


# ---- torch.ops.torchops, called past every check of the Python layer -----------------------


def calls_of(operator):
    return [call for call in raw_calls() if call.operator == operator]


def with_argument(call, position, value):
    arguments = list(call.fresh_arguments())
    arguments[position] = value
    return dataclasses.replace(call, arguments=tuple(arguments))


def tensor_positions(call):
    return [i for i, a in enumerate(call.arguments) if isinstance(a, torch.Tensor)]


def assert_refused(call, what):
    try:
        with torch.no_grad():
            call.overload(*call.arguments)
    except RuntimeError:
        return
    pytest.fail(f"{call.operator} accepted {what}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_raw_operator_refuses_a_wrong_rank(operator):
    for call in calls_of(operator):
        for position in tensor_positions(call):
            tensor = call.arguments[position]
            for shape in ((), (1,) * 7):
                wrong = with_argument(call, position, torch.ones(shape, dtype=tensor.dtype))
                assert_refused(wrong, f"argument {position} of shape {shape}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_raw_operator_refuses_a_wrong_dtype(operator):
    for call in calls_of(operator):
        for position in tensor_positions(call):
            for dtype in (torch.int64, torch.complex64, torch.bool):
                wrong = with_argument(call, position, call.arguments[position].to(dtype))
                assert_refused(wrong, f"argument {position} of {dtype}")


def test_raw_max_pools_refuse_windows_that_their_offsets_cannot_count():
    ops, image = torch.ops.torchops, torch.empty(1, 1, 1, 1)
    window = [70000, 70000, 1, 1, 35000, 35000, 1, 1, 0]
    with pytest.raises(RuntimeError, match="windows of less than 2\\^31 elements, but got 70000 x"):
        ops.max_pool2d(image, window)
    plane = image.expand(1, 1, 46342, 46342)
    with pytest.raises(RuntimeError, match="windows of less than 2\\^31 elements, but got 46342 x"):
        ops.adaptive_max_pool2d_backward(
            torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1, dtype=torch.int32), plane.shape
        )


def test_windows_of_more_than_2_to_the_31_elements_are_native_s():
    image = torch.randn(1, 1, 8, 8)
    with torchops.backend("auto"):
        pooled = TF.max_pool2d(image, 70000, 1, 35000, return_indices=True)
    native = F.max_pool2d(image, 70000, 1, 35000, return_indices=True)
    assert all(map(torch.equal, pooled, native))


# Arguments that decide the output's size: a larger window or more channels is another problem.
FREE = {("conv2d", 1), ("conv2d_bn_act", 1), ("conv2d_grad_input", 1)}


# The output is as large as these say, so another size is another call.
SETS_OUTPUT_SIZE = {("adaptive_max_pool2d_gather", "offsets")}


@pytest.mark.parametrize("operator", OPERATORS)
def test_raw_operator_refuses_tensors_that_do_not_fit_together(operator):
    """One more row or channel in any tensor but the first, which the others are measured by."""
    for call in calls_of(operator):
        for position in tensor_positions(call)[1:]:
            if (operator, position) in FREE:
                continue
            tensor = call.arguments[position]
            name = call.overload._schema.arguments[position].name
            free = 2 if (operator, name) in SETS_OUTPUT_SIZE else 0
            for axis in range(tensor.dim() - free):
                larger = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
                wrong = with_argument(call, position, larger)
                assert_refused(wrong, f"argument {position} of shape {tuple(larger.shape)}")


@pytest.mark.parametrize("operator", OPERATORS)
def test_raw_operator_survives_nonsense_numbers(operator):
    """Lists and ints out of range: an error or a result, never a crash or a wait."""
    for call in calls_of(operator):
        for position, argument in enumerate(call.arguments):
            if isinstance(argument, (list, tuple)):
                size = len(argument)
                nonsense = [[], [0] * size, [-1] * size, [2**31] * size, [2**62] * size]
                nonsense += [[*argument, 1], list(argument)[:-1]]
            elif isinstance(argument, int) and not isinstance(argument, bool):
                nonsense = [0, -1, 2**31, 2**62]
            else:
                continue
            for value in nonsense:
                wrong = with_argument(call, position, value)
                try:
                    with torch.no_grad():
                        wrong.overload(*wrong.arguments)
                except RuntimeError:
                    pass


@pytest.mark.parametrize("operator", OPERATORS)
def test_raw_operator_survives_wild_offsets(operator):
    """Integer tensors say where to read or write; no content of theirs may lead outside."""
    for call in calls_of(operator):
        for position in tensor_positions(call):
            tensor = call.arguments[position]
            if tensor.is_floating_point():
                continue
            for value in (torch.iinfo(tensor.dtype).min, torch.iinfo(tensor.dtype).max):
                wrong = with_argument(call, position, torch.full_like(tensor, value))
                try:
                    with torch.no_grad():
                        results = wrong.overload(*wrong.arguments)
                except RuntimeError:
                    continue
                assert results is not None
