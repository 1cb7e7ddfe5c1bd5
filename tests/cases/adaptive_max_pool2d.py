"""Cases of adaptive_max_pool2d and adaptive_max_pool1d."""

import torch
import torch.nn.functional as F

import torchops.functional as TF
from cases import BadInput, Case, Sample, distinct
from cases.adaptive_avg_pool2d import BAD_INPUTS, BAD_INPUTS_1D, SAMPLES_2D, sample

INDICES = Sample(((2, 3, 7, 8),), {"output_size": (3, 2), "return_indices": True})
WIDE = Sample(((1, 20, 40, 50),), {"output_size": 2, "return_indices": True})

CASES = [
    Case(
        "adaptive_max_pool2d",
        TF.adaptive_max_pool2d,
        F.adaptive_max_pool2d,
        [*SAMPLES_2D, INDICES, WIDE],
        [
            sample((2, 2, 5, 6), (3, 4)),
            sample((1, 2, 4, 3), 1),
            Sample(((1, 2, 5, 5),), {"output_size": 2, "return_indices": True}),
        ],
        bad_inputs=[
            *BAD_INPUTS,
            BadInput("no channels", lambda f: f(torch.randn(1, 0, 4, 4), 2)),
        ],
        make_tensors=distinct,
        exact=True,
    ),
    Case(
        "adaptive_max_pool1d",
        TF.adaptive_max_pool1d,
        F.adaptive_max_pool1d,
        [sample((2, 5, 17), 3), sample((4, 12), 1)],
        [sample((2, 2, 7), 3)],
        bad_inputs=BAD_INPUTS_1D,
        make_tensors=distinct,
        exact=True,
    ),
]
