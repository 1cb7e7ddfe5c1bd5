"""Cases of conv2d and its relatives. Arguments by position: input, weight, bias (or none)."""

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import BadInput, Case, Sample

# Native bfloat16 and float16 convolutions crash the process for some shapes.
NATIVE_DTYPES = (torch.float64, torch.float32)


def sample(input, weight, bias=True, **kwargs):
    return Sample((input, weight, weight[:1] if bias else None), kwargs)


SAMPLES_2D = [
    sample((2, 3, 8, 8), (4, 3, 3, 3)),
    sample((2, 5, 17, 19), (7, 5, 3, 3), stride=2, padding=1),
    sample((1, 72, 19, 33), (40, 72, 3, 3), bias=False, padding=1),
    sample((2, 33, 19, 19), (200, 33, 1, 1)),
    sample((2, 33, 19, 13), (20, 33, 1, 1), bias=False, stride=(2, 3)),
    sample((2, 33, 9, 9), (20, 33, 1, 1), padding=1),
    sample((1, 3, 33, 40), (16, 3, 7, 7), bias=False, stride=2, padding=3),
    sample((1, 520, 7, 7), (33, 520, 3, 3), padding=1),
    sample((4, 130, 9, 9), (140, 130, 3, 3), bias=False, padding=1),
    sample((2, 8, 14, 9), (12, 4, 2, 3), stride=(3, 1), padding=(1, 2), dilation=(1, 2), groups=2),
    sample((2, 128, 9, 9), (128, 4, 3, 3), bias=False, padding=1, groups=32),
    sample((1, 72, 19, 33), (72, 24, 3, 3), padding=1, groups=3),
    sample((2, 20, 9, 11), (30, 4, 3, 3), padding=1, groups=5),
    sample((2, 200, 7, 7), (40, 5, 3, 3), bias=False, stride=2, padding=1, groups=40),
    sample((3, 21, 5, 6), (14, 3, 5, 3), stride=(3, 2), padding=(4, 3), groups=7),
    sample((2, 8, 13, 12), (8, 2, 3, 3), stride=2, padding=2, dilation=3, groups=4),
    sample((1, 6, 19, 35), (3, 2, 1, 1), stride=2, groups=3),
    sample((5, 64, 14, 14), (64, 16, 3, 3), bias=False, padding=1, groups=4),
    # Several groups at a time, whose last registers reach beyond them.
    sample((1, 105, 13, 11), (205, 21, 3, 3), padding=1, groups=5),
    sample((1, 120, 3, 3), (120, 60, 3, 3), padding=2, groups=2),
    sample((2, 6, 9, 9), (12, 1, 3, 3), padding=1, groups=6),
    sample((2, 40, 19, 19), (40, 1, 5, 5), bias=False, stride=2, padding=2, groups=40),
    # Contiguous planes of short rows.
    sample((3, 40, 14, 13), (72, 40, 3, 3), stride=2, padding=1),
    sample((2, 33, 7, 6), (20, 33, 5, 5), bias=False, padding=2),
    sample((2, 37, 13, 14), (37, 1, 3, 3), padding=1, groups=37),
    sample((2, 40, 14, 15), (40, 1, 3, 3), bias=False, stride=2, padding=1, groups=40),
    sample((3, 20, 7, 7), (20, 1, 7, 7), padding=3, groups=20),
    sample((2, 4, 5, 5), (4, 4, 2, 2), stride=3, padding=2, dilation=2),
    sample((2, 5, 7, 6), (9, 5, 7, 6)),
    sample((2, 3, 3, 3), (4, 3, 5, 5), stride=2, padding=2),
    sample((2, 2, 9, 7), (3, 2, 1, 1), stride=4),
    sample((2, 16, 13, 9), (8, 16, 5, 3), padding="same"),
    sample((2, 16, 13, 9), (8, 16, 4, 2), padding="same"),
    sample((2, 4, 9, 9), (2, 4, 2, 3), padding="same", dilation=2),
    sample((2, 4, 9, 9), (2, 4, 3, 3), padding="valid", stride=2),
    sample((1, 5, 1, 1), (3, 5, 3, 3), padding=1),
    sample((2, 1, 6, 5), (1, 1, 3, 3)),
    sample((3, 9, 7), (5, 3, 3, 3), padding=1),
    sample((0, 3, 8, 8), (4, 3, 3, 3)),
]

SMALL_2D = [
    sample((2, 4, 5, 6), (6, 2, 3, 2), stride=2, padding=1, groups=2),
    sample((1, 2, 4, 4), (3, 2, 1, 1), bias=False),
    sample((2, 2, 5, 4), (4, 1, 2, 3), padding=2, dilation=2, groups=2),
]

SAMPLES_1D = [
    sample((2, 5, 17), (7, 5, 3), stride=2, padding=1),
    sample((2, 72, 33), (72, 1, 4), padding=3, groups=72),
    sample((3, 33, 19), (20, 33, 1), bias=False),
    sample((2, 6, 19), (8, 3, 4), padding="same", groups=2),
    sample((4, 12), (3, 4, 5), dilation=2, bias=False),
]

IMAGE, KERNEL = (1, 3, 4, 4), (2, 3, 3, 3)


def bad(name, *shapes, **kwargs):
    return BadInput(name, lambda f: f(*map(torch.randn, shapes), **kwargs))


BAD_INPUTS_2D = [
    bad("rank", (4, 4), KERNEL),
    bad("rank of the weight", IMAGE, (2, 3)),
    bad("channels", IMAGE, (2, 2, 3, 3)),
    bad("groups", IMAGE, KERNEL, groups=2),
    bad("groups do not divide the outputs", IMAGE, (2, 1, 3, 3), groups=3),
    bad("zero groups", IMAGE, KERNEL, groups=0),
    bad("kernel over input", IMAGE, (2, 3, 5, 5)),
    bad("empty kernel", IMAGE, (2, 3, 0, 3)),
    bad("empty spatial size", (1, 3, 0, 4), KERNEL),
    bad("bias size", IMAGE, KERNEL, (3,)),
    bad("negative padding", IMAGE, KERNEL, padding=-1),
    bad("zero stride", IMAGE, KERNEL, stride=0),
    bad("zero dilation", IMAGE, KERNEL, dilation=0),
    bad("stride of three", IMAGE, KERNEL, stride=(1, 1, 1)),
    bad("stride type", IMAGE, KERNEL, stride="fast"),
    bad("float stride", IMAGE, KERNEL, stride=1.5),
    bad("strided same", IMAGE, KERNEL, stride=2, padding="same"),
    bad("unknown padding", IMAGE, KERNEL, padding="full"),
    BadInput("dtypes", lambda f: f(torch.randn(IMAGE), torch.randn(KERNEL).double())),
    BadInput(
        "bias dtype", lambda f: f(torch.randn(IMAGE), torch.randn(KERNEL), torch.ones(2).int())
    ),
    BadInput("stride bool", lambda f: f(torch.randn(IMAGE), torch.randn(KERNEL), stride=True)),
    BadInput("groups bool", lambda f: f(torch.randn(IMAGE), torch.randn(KERNEL), groups=True)),
    BadInput("input is no tensor", lambda f: f("image", torch.randn(KERNEL))),
    BadInput("weight is no tensor", lambda f: f(torch.randn(IMAGE), "kernel")),
    BadInput("no weight", lambda f: f(torch.randn(IMAGE), None)),
]


def native_convolution2d(input, weight, bias=None, *args, **kwargs):
    return F.conv2d(input, weight.flip((-2, -1)), bias, *args, **kwargs)


CASES = [
    Case(
        "conv2d",
        TF.conv2d,
        F.conv2d,
        SAMPLES_2D,
        SMALL_2D,
        bad_inputs=BAD_INPUTS_2D,
        native_dtypes=NATIVE_DTYPES,
    ),
    Case(
        "convolution2d",
        TF.convolution2d,
        native_convolution2d,
        [sample((2, 5, 9, 11), (7, 5, 3, 2), stride=2, padding=1)],
        [sample((1, 2, 4, 5), (3, 2, 2, 3), padding=1)],
        bad_inputs=[bad("channels", IMAGE, (2, 2, 3, 3))],
        native_dtypes=NATIVE_DTYPES,
    ),
    Case(
        "conv1x1",
        TF.conv1x1,
        lambda input, weight, bias=None, stride=1: F.conv2d(input, weight, bias, stride),
        [
            sample((2, 72, 19, 9), (33, 72, 1, 1)),
            sample((2, 5, 8, 9), (4, 5, 1, 1), bias=False, stride=2),
            sample((3, 9, 7), (5, 3, 1, 1)),
        ],
        [sample((2, 3, 4, 3), (2, 3, 1, 1), stride=2)],
        bad_inputs=[bad("channels", IMAGE, (2, 2, 1, 1))],
        native_dtypes=NATIVE_DTYPES,
    ),
    Case(
        "conv1d",
        TF.conv1d,
        F.conv1d,
        SAMPLES_1D,
        [sample((2, 4, 7), (4, 2, 3), stride=2, padding=1, groups=2)],
        bad_inputs=[
            bad("rank", IMAGE, (2, 3, 3)),
            bad("channels", (1, 3, 4), (2, 2, 3)),
            bad("kernel over input", (1, 3, 4), (2, 3, 5)),
            bad("strided same", (1, 3, 4), (2, 3, 3), stride=2, padding="same"),
        ],
        native_dtypes=NATIVE_DTYPES,
    ),
]
