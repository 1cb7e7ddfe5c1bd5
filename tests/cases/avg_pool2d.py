"""Cases of avg_pool2d and avg_pool1d."""

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import BadInput, Case, Sample


def sample(shape, kernel_size, **kwargs):
    return Sample((shape,), {"kernel_size": kernel_size, **kwargs})


SAMPLES_2D = [
    sample((2, 3, 8, 8), 2),
    sample((2, 5, 17, 19), 3, stride=2, padding=1),
    sample((1, 72, 19, 33), 3, stride=1, padding=1),
    sample((2, 33, 13, 11), 5, stride=1, padding=2, count_include_pad=False),
    sample((2, 3, 14, 9), (2, 3), stride=(3, 1), padding=(1, 0), ceil_mode=True),
    sample((1, 4, 11, 10), 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    sample((1, 1, 3, 3), 2, stride=3, padding=1, ceil_mode=True, count_include_pad=False),
    sample((1, 2, 24, 24), 17, stride=1),
    sample((2, 7, 15, 16), 2, stride=3, divisor_override=5),
    sample((2, 3, 9, 9), 4, stride=3, padding=2, divisor_override=-3),
    sample((2, 7, 5, 6), 2, stride=5),
    sample((3, 9, 7), 3, stride=2, padding=1),
    sample((0, 3, 8, 8), 2),
    sample((2, 200, 1, 1), 1),
    sample((1, 2100, 3, 3), 3, stride=2, padding=1),
    sample((2, 17, 7, 7), 7),
]

CASES = [
    Case(
        "avg_pool2d",
        TF.avg_pool2d,
        F.avg_pool2d,
        SAMPLES_2D,
        [
            sample((2, 2, 5, 6), 3, stride=2, padding=1, count_include_pad=False),
            sample((1, 2, 6, 5), 2, stride=3, ceil_mode=True),
            sample((1, 2, 4, 4), 3, stride=1, divisor_override=7),
        ],
        bad_inputs=[
            BadInput("rank", lambda f: f(torch.randn(4, 4), 2)),
            BadInput("kernel over input", lambda f: f(torch.randn(1, 2, 4, 4), 9)),
            BadInput("not a tensor", lambda f: f("image", 2)),
            BadInput("kernel_size type", lambda f: f(torch.randn(1, 2, 4, 4), "wide")),
            BadInput("kernel_size float", lambda f: f(torch.randn(1, 2, 4, 4), 2.0)),
            BadInput("kernel_size of three", lambda f: f(torch.randn(1, 2, 4, 4), (2, 2, 2))),
            BadInput("kernel_size bool", lambda f: f(torch.randn(1, 2, 4, 4), True)),
            BadInput("zero kernel", lambda f: f(torch.randn(1, 2, 4, 4), 0)),
            BadInput("padding over half", lambda f: f(torch.randn(1, 2, 4, 4), 2, padding=2)),
            BadInput("negative padding", lambda f: f(torch.randn(1, 2, 4, 4), 2, padding=-1)),
            BadInput("zero stride", lambda f: f(torch.randn(1, 2, 4, 4), 2, stride=0)),
            BadInput("empty spatial size", lambda f: f(torch.randn(1, 2, 0, 4), 2)),
            BadInput("no channels", lambda f: f(torch.randn(1, 0, 4, 4), 2)),
            BadInput("zero divisor", lambda f: f(torch.randn(1, 2, 4, 4), 2, divisor_override=0)),
        ],
    ),
    Case(
        "avg_pool1d",
        TF.avg_pool1d,
        F.avg_pool1d,
        [
            sample((2, 5, 17), 3, stride=2, padding=1),
            sample((4, 12), 2, ceil_mode=True),
            sample((2, 3, 9), 4, stride=1, padding=2, count_include_pad=False),
        ],
        [sample((2, 2, 7), 3, stride=2, padding=1)],
        bad_inputs=[
            BadInput("rank", lambda f: f(torch.randn(1, 2, 4, 4), 2)),
            BadInput("kernel_size of two", lambda f: f(torch.randn(1, 2, 4), (2, 2))),
        ],
    ),
]
