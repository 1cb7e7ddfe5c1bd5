"""Cases of adaptive_avg_pool2d and adaptive_avg_pool1d."""

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import BadInput, Case, Sample


def sample(shape, output_size):
    return Sample((shape,), {"output_size": output_size})


SAMPLES_2D = [
    sample((2, 3, 8, 8), 1),
    sample((2, 5, 17, 19), (3, 4)),
    sample((1, 72, 19, 33), (7, None)),
    sample((2, 33, 14, 28), (7, 14)),
    sample((2, 3, 4, 5), (9, 11)),
    sample((2, 200, 7, 7), 1),
    sample((4, 33, 40, 6), (1, 3)),
    sample((3, 9, 7), 2),
    sample((0, 3, 8, 8), 2),
    sample((2, 200, 1, 1), 1),
]

BAD_INPUTS = [
    BadInput("rank", lambda f: f(torch.randn(4, 4), 2)),
    BadInput("rank five", lambda f: f(torch.randn(1, 1, 1, 4, 4), 2)),
    BadInput("not a tensor", lambda f: f("image", 2)),
    BadInput("output_size type", lambda f: f(torch.randn(1, 2, 4, 4), 2.0)),
    BadInput("output_size bool", lambda f: f(torch.randn(1, 2, 4, 4), (True, 1))),
    BadInput("output_size None", lambda f: f(torch.randn(1, 2, 4, 4), None)),
    BadInput("output_size of one", lambda f: f(torch.randn(1, 2, 4, 4), (2,))),
    BadInput("output_size of three", lambda f: f(torch.randn(1, 2, 4, 4), (2, 2, 2))),
    BadInput("negative output_size", lambda f: f(torch.randn(1, 2, 4, 4), -1)),
    BadInput("empty spatial size", lambda f: f(torch.randn(1, 2, 0, 4), 2)),
]

BAD_INPUTS_1D = [
    BadInput("rank", lambda f: f(torch.randn(1, 2, 4, 4), 2)),
    BadInput("output_size None", lambda f: f(torch.randn(1, 2, 4), None)),
    BadInput("output_size of two", lambda f: f(torch.randn(1, 2, 4), (2, 2))),
]

CASES = [
    Case(
        "adaptive_avg_pool2d",
        TF.adaptive_avg_pool2d,
        F.adaptive_avg_pool2d,
        [*SAMPLES_2D, sample((4, 9), 1)],  # torch's mean takes any rank
        [sample((2, 2, 5, 6), (3, 4)), sample((1, 2, 4, 3), 1), sample((2, 3, 4), (2, None))],
        bad_inputs=BAD_INPUTS,
    ),
    Case(
        "adaptive_avg_pool1d",
        TF.adaptive_avg_pool1d,
        F.adaptive_avg_pool1d,
        [sample((2, 5, 17), 3), sample((4, 12), 1), sample((2, 3, 9), 9)],
        [sample((2, 2, 7), 3)],
        bad_inputs=BAD_INPUTS_1D,
    ),
]
