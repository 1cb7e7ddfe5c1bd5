"""Cases of max_pool2d and max_pool1d."""

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import BadInput, Case, Sample, distinct


def sample(shape, kernel_size, **kwargs):
    return Sample((shape,), {"kernel_size": kernel_size, **kwargs})


SAMPLES_2D = [
    sample((2, 3, 8, 8), 2),
    sample((2, 5, 17, 19), 3, stride=2, padding=1),
    sample((1, 72, 19, 33), 3, stride=1, padding=1),
    sample((2, 33, 13, 11), 5, stride=1, padding=2),
    sample((2, 3, 14, 9), (2, 3), stride=(3, 1), padding=(1, 0), dilation=(1, 2)),
    sample((1, 4, 11, 10), 3, stride=2, ceil_mode=True),
    sample((1, 2, 24, 24), 17, stride=1),
    sample((3, 9, 7), 3, stride=2, padding=1, dilation=2),
    sample((1, 51, 7, 75), 2),
    sample((3, 3, 28, 56), 3, stride=2, padding=1),
    sample((0, 3, 8, 8), 2),
    sample((2, 200, 1, 1), 1),
    sample((2, 3, 7, 8), 3, stride=2, padding=1, return_indices=True),
    # Registers of channels, of which the last steps back; one row of windows; blocks of channels.
    sample((1, 72, 9, 11), 3, stride=2, padding=1),
    sample((1, 72, 6, 7), 2, stride=1, padding=1),
    sample((1, 40, 4, 9), 3, stride=(2, 1)),
    sample((1, 520, 3, 140), 3, stride=1, padding=1),
    # Large windows, wider than a register, too.
    sample((2, 3, 40, 37), (11, 9), stride=(11, 10), padding=(5, 4), return_indices=True),
    sample((1, 5, 11, 90), (5, 21), stride=(6, 21), padding=(2, 10)),
]

CASES = [
    Case(
        "max_pool2d",
        TF.max_pool2d,
        F.max_pool2d,
        SAMPLES_2D,
        [
            sample((2, 2, 5, 6), 3, stride=2, padding=1),
            sample((1, 2, 6, 5), 2, dilation=2),
            sample((1, 2, 5, 5), 2, return_indices=True),
        ],
        bad_inputs=[
            BadInput("rank", lambda f: f(torch.randn(4, 4), 2)),
            BadInput("kernel over input", lambda f: f(torch.randn(1, 2, 4, 4), 9)),
            BadInput("not a tensor", lambda f: f("image", 2)),
            BadInput("kernel_size type", lambda f: f(torch.randn(1, 2, 4, 4), "wide")),
            BadInput("dilation bool", lambda f: f(torch.randn(1, 2, 4, 4), 2, dilation=True)),
            BadInput("padding over half", lambda f: f(torch.randn(1, 2, 4, 4), 2, padding=2)),
            BadInput("negative padding", lambda f: f(torch.randn(1, 2, 4, 4), 2, padding=-1)),
            BadInput("zero stride", lambda f: f(torch.randn(1, 2, 4, 4), 2, stride=0)),
            BadInput("empty spatial size", lambda f: f(torch.randn(1, 2, 0, 4), 2)),
        ],
        make_tensors=distinct,
        exact=True,
    ),
    Case(
        "max_pool1d",
        TF.max_pool1d,
        F.max_pool1d,
        [sample((2, 5, 17), 3, stride=2, padding=1), sample((4, 12), 2, ceil_mode=True)],
        [sample((2, 2, 7), 3, stride=2, padding=1)],
        bad_inputs=[BadInput("rank", lambda f: f(torch.randn(1, 2, 4, 4), 2))],
        make_tensors=distinct,
        exact=True,
    ),
]
