"""Values that rounding rules say little about: NaN, infinities, signed zeros, subnormals, ties."""

import math

import pytest
import torch
import torch.nn.functional as F

import torchops
import torchops.functional as TF
from cases import Sample
from support import (
    FORMATS,
    assert_within_rule,
    doubles,
    each_case,
    each_dtype,
    each_nonempty_sample,
    each_sample,
    gradients,
    largest_finite,
    results,
)
from torchops import _C
from torchops._tolerance import ulp

PLANTED = {
    "nan": [math.nan],
    "inf": [math.inf],
    "minus_inf": [-math.inf],
    "both_infs": [math.inf, -math.inf],
    "nan_beside_inf": [math.nan, math.inf],
}


def assert_as_native(case, sample, tensors):
    """Forward against float64; where an operator selects, native's own bits and signs of zeros."""
    assert_within_rule(case, sample, tensors, tensors[0].dtype, results)
    if case.exact:
        for own, native in zip(
            results(case, case.own, sample, tensors),
            results(case, case.native, sample, tensors),
            strict=True,
        ):
            torch.testing.assert_close(own, native, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(own.signbit(), native.signbit())


@each_nonempty_sample
@each_dtype
@pytest.mark.parametrize("planted", PLANTED)
def test_not_finite(case, sample, dtype, planted):
    tensors = case.tensors(sample, dtype)
    elements = tensors[0].view(-1)
    where = torch.randperm(len(elements))[: 2 * len(PLANTED[planted])]
    for index, place in enumerate(where):
        elements[place] = PLANTED[planted][index % len(PLANTED[planted])]
    assert_as_native(case, sample, tensors)


@each_sample
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -math.inf, math.inf, math.nan])
def test_constant_input(case, sample, value):
    """Ties everywhere, all-minus-infinity windows, variance zero."""
    tensors = case.tensors(sample, torch.float32)
    tensors[0].fill_(value)
    assert_as_native(case, sample, tensors)


@each_sample
def test_gradient_of_a_tie_goes_where_native_sends_it(case, sample):
    tensors = case.tensors(sample, torch.float64)
    tensors[0].copy_(tensors[0].sign())
    own = gradients(case, case.own, sample, tensors)
    native = gradients(case, case.native, sample, tensors)
    torch.testing.assert_close(own, native)


@each_sample
@each_dtype
def test_zeros_of_both_signs(case, sample, dtype):
    tensors = case.tensors(sample, dtype)
    tensors[0].mul_(0.0)
    assert_as_native(case, sample, tensors)


def takes_subnormals_for_zero(case, dtype):
    """Whether the processor's own bfloat16 instructions may compute this: they flush, always."""
    convolves = case.name.startswith(("conv", "cross_correlation"))
    return convolves and dtype is torch.bfloat16 and _C.cpu_isa() not in ("baseline", "avx2")


def assert_exact_or_of_zeros(case, sample, tensors):
    """Every element is that of the input as it is, or of an input of zeros."""
    zeros = [torch.zeros_like(tensors[0]), *tensors[1:]]
    (own,) = results(case, case.own, sample, tensors)
    exact, of_zeros = (
        results(case, case.native, sample, doubles(inputs))[0] for inputs in (tensors, zeros)
    )
    error = torch.minimum((own - exact).abs(), (own - of_zeros).abs())
    assert (error <= ulp(largest_finite(exact), torch.bfloat16)).all()


@each_sample
@each_dtype
def test_subnormals(case, sample, dtype):
    tensors = case.tensors(sample, dtype)
    tensors[0].copy_(tensors[0].double().div(10).mul(torch.finfo(dtype).tiny))
    if takes_subnormals_for_zero(case, dtype):
        return assert_exact_or_of_zeros(case, sample, tensors)
    assert_as_native(case, sample, tensors)


@each_nonempty_sample
def test_near_the_largest_number(case, sample):
    """Sums of float16 numbers are float32 sums: only a result that is too large is infinite."""
    tensors = case.tensors(sample, torch.float16)
    largest = tensors[0].abs().max()
    tensors[0].copy_((tensors[0] / largest).double() * torch.finfo(torch.float16).max)
    assert_as_native(case, sample, tensors)


def outcome(compute):
    """Shapes of what a computation gives, or the type and text of what it raises."""
    try:
        return [result.shape for result in compute()]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@each_dtype
@pytest.mark.parametrize("grads", [(1, 2**-9, 2**-9, 2**-8), (1, -1, 3, -0.5), (-0.0, 2, -2, 0)])
def test_gradients_of_windows_that_share_a_winner(grads, dtype, memory_format):
    """They are added up before they are rounded, also where some of them add up to zero."""
    input = torch.rand(2, 3, 20, 26, dtype=dtype).contiguous(memory_format=memory_format)
    input[..., 6, 8] = 2  # in four of the windows of 3 x 3 outputs
    input.requires_grad_()
    grad = torch.zeros(2, 3, 3, 3, dtype=dtype)
    grad[..., :2, :2] = torch.tensor(grads, dtype=dtype).view(2, 2)
    for pool in (
        lambda x: TF.adaptive_max_pool2d(x, 3),
        lambda x: TF.max_pool2d(x, (8, 10), (6, 8)),
    ):
        with torchops.backend("own"):
            (found,) = torch.autograd.grad(pool(input), input, grad)
        assert (found[..., 6, 8] == torch.tensor(grads).double().sum().to(dtype)).all()
        assert found.count_nonzero() == found[..., 6, 8].count_nonzero()
        assert not found.signbit().any() or sum(grads) < 0


def assert_native_winners(input, *arguments):
    """max_pool2d gives native's bits and indices, and the same bits where no indices are asked."""
    expected = F.max_pool2d(input, *arguments, return_indices=True)
    with torchops.backend("own"):
        found = TF.max_pool2d(input, *arguments, return_indices=True)
        alone = TF.max_pool2d(input, *arguments)
    assert torch.equal(found[1], expected[1])
    for output in (found[0], alone):
        torch.testing.assert_close(output, expected[0], rtol=0, atol=0, equal_nan=True)
        signs = [x.signbit() & ~x.isnan() for x in (output, expected[0])]
        assert torch.equal(*signs)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_winners_of_small_windows(kernel_size, stride, dtype, memory_format):
    """Rows around half a register, one and two, of odd and even numbers of planes: native's bits
    and indices among ties, NaNs and infinities, some rows of which have nothing else."""
    values = torch.tensor([-1, -0.0, 0, 1, math.nan, math.inf, -math.inf])
    odds = torch.tensor([[3, 2, 2, 2, 0, 0, 0], [9, 9, 9, 9, 1, 1, 9], [0, 0, 0, 0, 1, 0, 9.0]])
    for width in [3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 34, 35, 64, 65]:
        for padding, ceil_mode in [(0, False), (0, True), (1, False), (1, True)]:
            shape = (1, width % 2 + 2, 3 + width % 5, width)
            picks = torch.multinomial(odds[torch.randint(3, (shape[1] * shape[2],))], width, True)
            input = values[picks].view(shape).to(dtype).contiguous(memory_format=memory_format)
            arguments = kernel_size, stride, padding, 1, ceil_mode
            assert_native_winners(input, *arguments)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@each_dtype
@pytest.mark.parametrize("kernel_size, stride, padding, dilation, ceil_mode", [
    (2, 1, 1, 1, False), (3, 1, 1, 1, False), (3, 2, 0, 1, True), (3, 2, 1, 2, False),
    ((2, 5), (1, 2), (1, 2), (3, 1), True), (5, 3, 2, 1, True), (7, 1, 3, 1, False),
    (8, 2, 4, 1, False),
])  # fmt: skip
def test_winners_over_many_channels(
    kernel_size, stride, padding, dilation, ceil_mode, dtype, memory_format
):
    """Around one register of any kind and several: native's bits and indices, whether no value is
    out of the order of numbers or a few are. A NaN of either sign wins, though its bits may be the
    least; a zero of negative sign is no less than the others."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for channels in [1, 15, 31, 33, 72, 130, 200]:
        for value in [1, math.nan, -math.nan, -0.0, -math.inf, 1e-7]:
            input = torch.randint(-2, 1, (2, channels, 15, 13)).to(dtype)
            places = torch.randint(input.numel(), (3,))
            input.view(-1)[places] = value
            if math.copysign(1, value) < 0:  # conversions drop the sign of a NaN
                input.view(bits).view(-1)[places] |= torch.iinfo(bits).min
            input = input.contiguous(memory_format=memory_format)
            assert_native_winners(input, kernel_size, stride, padding, dilation, ceil_mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 520, 3, 260), (1, 1696, 14, 110)], ids=str)
def test_winners_of_blocks_of_channels(shape, dtype):
    """Wide rows of many channels; outputs that go past the cache."""
    input = torch.randint(-4, 5, shape).to(dtype).contiguous(memory_format=torch.channels_last)
    assert_native_winners(input, 3, 1, 1)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 130, 129), (1, 160, 90, 91), (1, 200, 75, 150)], ids=str)
@pytest.mark.parametrize("kernel_size, stride, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_large_gradients_of_max_pools(kernel_size, stride, padding, shape, dtype, memory_format):
    """More than goes through the cache, or would if its channels made whole lines; sums of small
    integers are exact."""
    input = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    grads = []
    for pool, leaf in [(TF.max_pool2d, input), (F.max_pool2d, input.double())]:
        output = pool(leaf.requires_grad_(), kernel_size, stride, padding)
        torch.manual_seed(0)
        grad_output = torch.randint(-4, 5, output.shape).to(output.dtype)
        (grad,) = torch.autograd.grad(output, leaf, grad_output)
        grads.append(grad.double())
    assert torch.equal(*grads)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size, stride, padding", [
    (2, 1, 0), (2, 1, 1), (2, 2, 0), (3, 1, 0), (3, 1, 1), (3, 2, 0), (3, 2, 1), (3, 3, 0)
])  # fmt: skip
def test_a_nan_on_its_own(kernel_size, stride, padding, dtype, memory_format):
    """Wherever it stands, in maps down to a single window: it is in the windows that see it."""
    for height, width in [(3, 3), (4, 1), (5, 3), (4, 4), (5, 5), (3, 17), (3, 20)]:
        if width + 2 * padding < kernel_size:
            continue
        for place in range(height * width):
            input = torch.rand(1, 1, height, width)
            input.view(-1)[place] = math.nan
            input = input.to(dtype).contiguous(memory_format=memory_format)
            expected = F.max_pool2d(input, kernel_size, stride, padding)
            with torchops.backend("own"):
                found = TF.max_pool2d(input, kernel_size, stride, padding)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@each_case
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("compute", [results, gradients], ids=["forward", "backward"])
def test_zero_size(case, axis, compute):
    """Each axis of the input empty in turn: native's empty result or native's error."""
    for original in case.samples:
        if axis >= len(original.shapes[0]):
            continue
        shape = list(original.shapes[0])
        shape[axis] = 0
        sample = Sample((tuple(shape), *original.shapes[1:]), original.kwargs)
        tensors = case.tensors(original, torch.float32)
        tensors[0] = torch.empty(shape)
        if axis == 1:  # without channels there is nothing per channel either
            channels = original.shapes[0][1:2]
            tensors = [
                t[:0] if t is not None and t.shape == channels and t.dim() == 1 else t
                for t in tensors
            ]
        own, native = (
            outcome(lambda: compute(case, function, sample, tensors))  # noqa: B023
            for function in (case.own, case.native)
        )
        if case.composed(sample) and isinstance(native, tuple):
            assert isinstance(own, tuple), sample  # no twin, no text to keep to
        else:
            assert own == native, sample


@each_dtype
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("output_size", [0, (3, 0), (0, 3)])
@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_no_windows(name, output_size, memory_format, dtype):
    """An adaptive pool to nothing, which native computes but does not differentiate."""
    images = torch.randn(2, 3, 9, 8).to(dtype, memory_format=memory_format)
    for input in (images, images[0]):
        input = input.detach().requires_grad_()
        found = []
        for ops in (TF, torch.nn.functional):
            output = getattr(ops, name)(input, output_size)
            assert getattr(ops, name)(input.detach(), output_size).shape == output.shape
            message = outcome(lambda: torch.autograd.grad(output.sum(), input))  # noqa: B023
            found.append((output.shape, output.stride(), message))
        assert found[0] == found[1]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 2])
@pytest.mark.parametrize("batch", [(), (0,), (2,)])
def test_no_input_channels(batch, kernel_size, groups, dims):
    """Native's output has none, either."""
    name, found = f"conv{dims}d", []
    for ops in (TF, torch.nn.functional):
        input = torch.randn(*batch, 0, *(5,) * dims, requires_grad=True)
        weight = torch.randn(4, 0, *(kernel_size,) * dims, requires_grad=True)
        bias = torch.randn(4, requires_grad=True)
        output = getattr(ops, name)(input, weight, bias, groups=groups)
        found.append([output, *torch.autograd.grad(output.sum(), [input, weight, bias])])
    assert all(map(torch.equal, *found))


def test_raw_operators_need_input_channels():
    """Groups of no channels would be divided by."""
    numbers = ([1], [0], [1], 2)
    input, weight, output = (
        torch.ones(size) for size in ((2, 0, 5, 5), (4, 0, 1, 1), (2, 4, 5, 5))
    )
    operators = torch.ops.torchops
    for call in (
        lambda: operators.conv2d(input, weight, None, *numbers),
        lambda: operators.conv2d_grad_input(output, weight, input.shape, *numbers, False),
        lambda: operators.conv2d_grad_weight(input, output, weight.shape, *numbers, False),
    ):
        with pytest.raises(RuntimeError, match="with channels"):
            call()


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_statistics_that_are_infinite(memory_format):
    input = torch.randn(2, 4, 3, 5).contiguous(memory_format=memory_format)
    mean = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    outputs = [norm(input, mean, torch.ones(4)) for norm in (TF.batch_norm, F.batch_norm)]
    torch.testing.assert_close(*outputs, equal_nan=True)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, kernel_size, dilation", [
    ((2, 5, 1, 400), (1, 201), 1), ((1, 20, 40, 37), (17, 21), 1), ((1, 3, 60, 60), (9, 9), 3),
    ((2, 70, 30, 30), (13, 9), 1),
])  # fmt: skip
def test_gradients_of_windows_that_overlap_many_times(
    shape, kernel_size, dilation, dtype, memory_format
):
    """Sums of small integers are exact."""
    input = torch.randint(-9, 10, shape).to(dtype).contiguous(memory_format=memory_format)
    padding = tuple(size // 2 for size in kernel_size)
    grads = []
    for pool, leaf in [(TF.max_pool2d, input), (F.max_pool2d, input.double())]:
        output = pool(leaf.requires_grad_(), kernel_size, 1, padding, dilation)
        torch.manual_seed(0)
        grad_output = torch.randint(-1, 2, output.shape).to(output.dtype)
        (grad,) = torch.autograd.grad(output, leaf, grad_output)
        grads.append(grad.double())
    assert torch.equal(*grads)
