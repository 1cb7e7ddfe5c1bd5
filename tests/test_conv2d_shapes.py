"""Convolutions at the seams of their kernels: windows, strides, odd channels, misaligned tensors.

Raw operators against float64. The GPU's kernels run it too, on tests/cuda_emulator.
"""

import pytest
import torch
import torch.nn.functional as F

import torchops  # noqa: F401  loads the operators

# batch, channels, height, width, kernel, stride, padding, dilation, output channels, groups
CASES = [
    *(
        (2, 6, 9, 13, (k, k), (s, s), (k // 2, k // 2), (1, 1), 6, 6)
        for k in (3, 5, 7)
        for s in (1, 2)
    ),
    *(
        (1, 20, 6, 37, (k, k), (s, s), (k // 2, k // 2), (1, 1), 20, 20)
        for k in (3, 7)
        for s in (1, 2)
    ),
    (1, 66, 11, 8, (3, 3), (1, 1), (1, 1), (1, 1), 66, 66),
    # depthwise by masks: two rows to a vector, the last alone, with and without the border of both;
    # several tiles and blocks, the last of which step back; rows of padding alone
    *((2, 5, 7, 7, (k, k), (1, 1), (k // 2, k // 2), (1, 1), 5, 5) for k in (3, 5)),
    (1, 3, 18, 5, (5, 5), (1, 1), (3, 2), (1, 1), 3, 3),
    *((2, 3, 17, 41, (k, k), (s, s), (1, 2), (1, 1), 3, 3) for k in (3, 5, 7) for s in (1, 2)),
    (3, 2, 14, 14, (5, 5), (2, 2), (2, 2), (1, 1), 2, 2),
    (1, 4, 3, 12, (3, 3), (1, 1), (5, 4), (1, 1), 4, 4),
    (3, 4, 10, 17, (3, 3), (2, 2), (0, 1), (1, 1), 4, 4),
    (2, 4, 9, 9, (3, 3), (1, 1), (2, 2), (2, 2), 8, 4),
    (2, 3, 1, 19, (1, 4), (1, 1), (0, 3), (1, 1), 3, 3),
    (2, 4, 8, 9, (2, 3), (3, 2), (1, 0), (1, 2), 12, 4),
    # depthwise tap by tap: borders on all sides, phases without taps, four vectors and a rest
    (2, 70, 7, 19, (2, 2), (1, 1), (1, 1), (1, 1), 70, 70),
    (1, 17, 12, 11, (3, 3), (4, 4), (1, 1), (1, 1), 17, 17),
    (2, 83, 9, 10, (3, 5), (2, 1), (3, 4), (3, 2), 83, 83),
    (1, 33, 5, 23, (1, 11), (1, 2), (0, 5), (1, 1), 33, 33),
    (2, 5, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1), 70, 1),
    (2, 8, 6, 7, (2, 3), (2, 1), (1, 0), (1, 2), 12, 4),
    (3, 7, 5, 9, (1, 1), (1, 1), (0, 0), (1, 1), 6, 1),
    (2, 6, 8, 8, (1, 1), (2, 2), (0, 0), (1, 1), 4, 1),
    # few channels on one side; rows of whole vectors, cut into parts, with the stride's phases
    (1, 9, 3, 150, (3, 3), (1, 1), (1, 1), (1, 1), 2, 1),
    (2, 3, 17, 32, (7, 7), (2, 2), (3, 3), (1, 1), 16, 1),
    (1, 3, 9, 270, (2, 5), (1, 3), (0, 2), (2, 2), 4, 1),
    # several blocks of depth, of channels and of positions
    (2, 40, 9, 11, (3, 3), (1, 1), (1, 1), (1, 1), 270, 1),
    (1, 270, 16, 17, (1, 1), (1, 1), (0, 0), (1, 1), 20, 1),
    # 1x1: blocks of pixels across images, whole ones and some of both
    (3, 270, 7, 7, (1, 1), (1, 1), (0, 0), (1, 1), 150, 1),
    (2, 20, 13, 12, (1, 1), (1, 1), (0, 0), (1, 1), 137, 1),
    (9, 17, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 9, 1),
    (1, 70, 7, 7, (1, 1), (1, 1), (0, 0), (1, 1), 45, 1),  # few pixels, the last one a column alone
    # 1x1, images read where they lie: two blocks of rows and of depth, the last pixel alone; a row
    (2, 60, 15, 15, (1, 1), (1, 1), (0, 0), (1, 1), 140, 1),
    (1, 140, 1, 150, (1, 1), (1, 1), (0, 0), (1, 1), 17, 1),
    # the same with all of the depth at a time
    (2, 60, 28, 29, (1, 1), (1, 1), (0, 0), (1, 1), 140, 1),
    # 1x1, windows apart: long rows and short ones, pixels left over, of one axis and of both
    (2, 20, 9, 70, (1, 1), (2, 2), (0, 0), (1, 1), 24, 1),
    (1, 9, 13, 67, (1, 1), (1, 2), (0, 0), (1, 1), 17, 1),
    (2, 17, 12, 36, (1, 1), (5, 3), (0, 0), (1, 1), 12, 1),
    # 1x1, grad_weight turned over: many pixels, of more channels than the other side has
    (1, 9, 65, 64, (1, 1), (1, 1), (0, 0), (1, 1), 21, 1),
    (2, 75, 16, 17, (1, 1), (1, 1), (0, 0), (1, 1), 33, 1),
    # 3x3 through Winograd's transform: odd sizes and channels, several blocks of all
    (2, 37, 11, 19, (3, 3), (1, 1), (1, 1), (1, 1), 41, 1),
    (1, 130, 9, 14, (3, 3), (1, 1), (0, 2), (1, 1), 150, 1),
    # the same in groups: several to a block with a rest, of other widths out than in, wide ones
    (2, 120, 11, 19, (3, 3), (1, 1), (1, 1), (1, 1), 120, 5),
    (1, 63, 9, 14, (3, 3), (1, 1), (0, 2), (1, 1), 93, 3),
    (3, 96, 8, 9, (3, 3), (1, 1), (1, 1), (1, 1), 102, 6),
    (1, 280, 12, 12, (3, 3), (1, 1), (1, 1), (1, 1), 300, 2),
    # rows of the image as they lie in channels_last: several blocks of lines and of channels, sums
    # straight into the output; then an odd number of them, over a tile, in parts of a row
    (1, 40, 6, 53, (3, 3), (2, 2), (1, 1), (1, 1), 136, 1),
    (2, 3, 9, 110, (5, 5), (2, 2), (2, 2), (1, 1), 19, 1),
    # bf16 in pairs: taps merged into runs that straddle chunks, dilation that keeps them apart, odd
    # rows, blocks of patches and of channels with a rest, rows cut into parts, all phases
    (2, 22, 9, 13, (3, 5), (1, 2), (1, 2), (1, 1), 35, 1),
    (1, 21, 14, 23, (3, 3), (1, 2), (2, 3), (2, 3), 50, 1),
    (2, 66, 45, 31, (3, 3), (1, 1), (1, 1), (1, 1), 34, 1),
    (1, 33, 4, 1100, (2, 3), (2, 1), (1, 1), (1, 1), 20, 1),
    (5, 530, 5, 7, (3, 2), (2, 3), (1, 1), (1, 1), 300, 1),
    (2, 64, 19, 31, (1, 1), (1, 1), (0, 0), (1, 1), 300, 1),
    (2, 96, 19, 31, (1, 1), (1, 1), (0, 0), (1, 1), 24, 1),
    # bf16 in pairs, groups: whole chunks of channels and less, several to a slice and a rest;
    # windows that overlap, of one row and of phases; images of one pixel
    (2, 128, 9, 13, (3, 3), (1, 1), (1, 1), (1, 1), 192, 4),
    (1, 144, 11, 15, (3, 3), (2, 2), (1, 1), (1, 1), 72, 9),
    (2, 40, 9, 70, (3, 5), (1, 2), (1, 2), (1, 1), 80, 5),
    (1, 45, 12, 11, (2, 3), (2, 3), (1, 1), (1, 1), 51, 3),
    (2, 88, 10, 9, (3, 3), (1, 1), (2, 2), (2, 2), 99, 11),
    (3, 128, 8, 12, (1, 1), (1, 1), (0, 0), (1, 1), 64, 4),
    (1, 600, 9, 9, (3, 3), (1, 1), (1, 1), (1, 1), 580, 2),
    (1, 280, 9, 8, (3, 3), (2, 1), (1, 1), (1, 1), 270, 2),
    (3, 64, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 32, 4),
    # bf16 in pairs: strides far wider than the window, and than the image, whose phases nobody sees
    (1, 20, 90, 85, (3, 2), (40, 37), (1, 1), (1, 1), 18, 1),
    (2, 32, 5, 6, (3, 3), (100_000, 100_000), (1, 1), (1, 1), 34, 1),
    # patches: through planes of their own, and too few or too many elements for that
    (2, 3, 24, 36, (2, 2), (2, 2), (0, 0), (1, 1), 21, 1),
    (2, 5, 48, 51, (4, 3), (4, 3), (0, 0), (1, 1), 40, 1),
    (3, 40, 6, 8, (2, 2), (2, 2), (0, 0), (1, 1), 33, 1),
    (1, 300, 26, 24, (2, 2), (2, 2), (0, 0), (1, 1), 20, 1),
    # grad_weight from rows of the image: shares, several slabs, panels of one to four registers
    (2, 12, 45, 33, (5, 5), (1, 1), (2, 2), (1, 1), 44, 1),
    (3, 3, 70, 61, (7, 7), (2, 2), (3, 3), (1, 1), 70, 1),
    (2, 9, 37, 40, (3, 2), (1, 2), (1, 0), (2, 1), 116, 1),
    (1, 30, 19, 17, (4, 3), (3, 1), (2, 1), (1, 1), 15, 1),
    # tensor cores: stride and dilation that share a divisor, channels in whole chunks of 16 bytes
    (1, 16, 13, 21, (3, 4), (2, 4), (3, 2), (2, 6), 48, 2),
    (2, 64, 9, 7, (1, 1), (2, 2), (0, 0), (1, 1), 72, 1),
    # bfloat16, contiguous: more than is turned over as a whole
    (8, 64, 46, 47, (3, 3), (1, 1), (1, 1), (1, 1), 64, 1),
]
TOLERANCE = {
    torch.float64: 4e-14,
    torch.float32: 4e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}


def misaligned(tensor):
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return buffer.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("channels_last", "weight_format"),
    [
        (False, torch.contiguous_format),
        (True, torch.contiguous_format),
        (True, torch.channels_last),
    ],
    ids=["contiguous", "channels_last", "channels_last-weight_too"],
)
@pytest.mark.parametrize("align", [lambda t: t, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_and_its_gradients(case, align, channels_last, weight_format, dtype):
    batch, channels, height, width, kernel, *window, out_channels, groups = case
    arguments = (*map(list, window), groups)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    x = align(draw(batch, channels, height, width).contiguous(memory_format=memory_format))
    weight, bias = draw(out_channels, channels // groups, *kernel), draw(out_channels)
    weight = weight.contiguous(memory_format=weight_format)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = F.conv2d(exact_x, exact_weight, bias.double(), *arguments)
    grad = align(draw(*exact.shape).contiguous(memory_format=memory_format))
    expected = (exact, *torch.autograd.grad(exact, (exact_x, exact_weight), grad.double()))
    raw = torch.ops.torchops
    results = (
        raw.conv2d(x, weight, bias, *arguments),
        raw.conv2d_grad_input(grad, weight, list(x.shape), *arguments, channels_last),
        raw.conv2d_grad_weight(x, grad, list(weight.shape), *arguments, channels_last),
    )
    for result, reference in zip(results, expected, strict=True):
        error = (result.double() - reference).abs().max() / reference.abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_where_it_is(dtype, groups, value, channels_last):
    """Winograd's transform would carry it to outputs whose windows do not see it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.ones(1, 32, 16, 16, dtype=dtype).contiguous(memory_format=memory_format)
    x[0, 5, 7, 7] = value
    weight = torch.full((32, 32 // groups, 3, 3), 0.25, dtype=dtype)
    result = torch.ops.torchops.conv2d(x, weight, None, [1, 1], [1, 1], [1, 1], groups)
    expected = F.conv2d(x.double(), weight.double(), None, 1, 1, groups=groups).to(dtype)
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 20, 40])
@pytest.mark.parametrize("kernel, stride", [((2, 2), 3), ((3, 2), 4), ((1, 1), 2)], ids=str)
def test_pixels_that_no_window_sees_are_infinite(kernel, stride, channels, dtype, channels_last):
    """They lie beside what is seen, and zero times infinity is NaN."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    height, width = 4 * stride + kernel[0], 5 * stride + kernel[1] + 1
    seen = torch.zeros(height, width, dtype=torch.bool)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            seen[i::stride, j::stride] = True
    seen[5 * stride :] = seen[:, 6 * stride :] = False
    x = torch.randn(2, channels, height, width, generator=generator).to(dtype)
    x = x.contiguous(memory_format=memory_format)
    infinite = torch.where(seen, x, float("inf")).contiguous(memory_format=memory_format)
    weight = torch.randn(10, channels, *kernel, generator=generator).to(dtype)
    arguments = ([stride, stride], [0, 0], [1, 1], 1)
    raw = torch.ops.torchops
    output = raw.conv2d(x, weight, None, *arguments)
    assert output.isfinite().all()
    torch.testing.assert_close(raw.conv2d(infinite, weight, None, *arguments), output)
    grad = torch.randn(output.shape, generator=generator).to(dtype)
    sizes = list(weight.shape)
    torch.testing.assert_close(
        raw.conv2d_grad_weight(infinite, grad, sizes, *arguments, channels_last),
        raw.conv2d_grad_weight(x, grad, sizes, *arguments, channels_last),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [8, 11, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_groups_leave_their_neighbours_alone(dtype, channels, channels_last):
    """They lie side by side, and zero times infinity is NaN."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3 * channels, 9, 11, generator=generator).to(dtype)
    weight = torch.randn(3 * channels, channels, 3, 3, generator=generator).to(dtype)
    grad = torch.randn(2, 3 * channels, 9, 11, generator=generator).to(dtype)
    x, grad = (t.contiguous(memory_format=memory_format) for t in (x, grad))
    middle = slice(channels, 2 * channels)
    infinite_x, infinite_grad = x.clone(), grad.clone()
    infinite_x[:, middle] = infinite_grad[:, middle] = float("inf")
    arguments = ([1, 1], [1, 1], [1, 1], 3)
    raw = torch.ops.torchops

    def compute(x, grad):
        return (
            raw.conv2d(x, weight, None, *arguments),
            raw.conv2d_grad_input(grad, weight, list(x.shape), *arguments, channels_last),
            raw.conv2d_grad_weight(x, grad, list(weight.shape), *arguments, channels_last),
        )

    for dim, found, expected in zip(
        (1, 1, 0), compute(infinite_x, infinite_grad), compute(x, grad), strict=True
    ):
        # Wide groups go through Winograd's transform where all is finite, which rounds otherwise.
        limit = TOLERANCE[dtype] * expected.abs().max() if dtype == torch.float32 else 0
        for first in (0, 2 * channels):
            others = (t.narrow(dim, first, channels) for t in (found, expected))
            torch.testing.assert_close(*others, rtol=0, atol=float(limit))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_grad_weight_of_infinite_borders(stride, channels_last):
    """Zero times infinity is NaN: an output beyond the last column must not be multiplied."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 7, 7, generator=generator).contiguous(memory_format=memory_format)
    x[..., -1] = float("inf")
    weight = torch.zeros(16, 1, 3, 3, requires_grad=True)
    output = F.conv2d(x, weight, None, stride, 1, 1, 16)
    grad = torch.randn(output.shape, generator=generator).contiguous(memory_format=memory_format)
    (native,) = torch.autograd.grad(output, weight, grad)
    result = torch.ops.torchops.conv2d_grad_weight(
        x, grad, [16, 1, 3, 3], [stride, stride], [1, 1], [1, 1], 16, channels_last
    )
    torch.testing.assert_close(result, native, equal_nan=True)
