"""Cases of batch_norm: every activation, with and without residual, training and evaluation."""

import torch

import torchops.functional as TF
from cases import BadInput, Case, Sample
from torchops.ops._activation import ACTIVATIONS
from torchops.ops.batch_norm import native_batch_norm, native_ending


def own(
    input, running_mean=None, running_var=None, weight=None, bias=None, residual=None, **kwargs
):
    return TF.batch_norm(
        input, running_mean, running_var, weight, bias, residual=residual, **kwargs
    )


def native(
    input, running_mean=None, running_var=None, weight=None, bias=None, residual=None, **kwargs
):
    return native_batch_norm(
        input, running_mean, running_var, weight, bias, residual=residual, **kwargs
    )


def reference(input, *arguments, training=False, activation=None, eps=1e-5, **kwargs):
    """native, but in training from elementary operations: native's second derivatives of weight and
    input together, and its reverse over forward mode, are wrong (torch 2.13)."""
    if not training:
        return native(
            input, *arguments, training=training, activation=activation, eps=eps, **kwargs
        )
    _, _, weight, bias, residual = (*arguments, None, None, None, None, None)[:5]
    axes = [0, *range(2, input.dim())]
    var, mean = torch.var_mean(input, axes, correction=0, keepdim=True)
    output = (input - mean) / torch.sqrt(var + eps)
    column = (-1, *(1,) * (input.dim() - 2))
    if weight is not None:
        output = output * weight.view(column) + bias.view(column)
    return native_ending(output, activation, residual)


def sample(shape, *, affine=True, running=True, residual=False, training=True, **kwargs):
    channels = (shape[1],)
    statistics, parameters = (channels if given else None for given in (running, affine))
    shapes = (shape, statistics, statistics, parameters, parameters, shape if residual else None)
    return Sample(shapes, {"training": training, **kwargs})


def make_tensors(sample, generator):
    """Standard normal; variances and weights between 0.5 and 1.5."""
    tensors = []
    for position, shape in enumerate(sample.shapes):
        if shape is None:
            tensors.append(None)
        elif position in (2, 3):
            tensors.append(0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
        else:
            tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return tensors


def scale(sample, tensors):
    """input and its mean, both times weight / sqrt(var + eps), cancel."""
    input, weight = tensors[0].double(), tensors[3]
    if not sample.kwargs["training"] or input.numel() == 0 or not input.isfinite().all():
        return 0.0
    pixels = input.transpose(0, 1).flatten(1)
    terms = pixels.abs().amax(1) / (pixels.var(1, correction=0) + 1e-5).sqrt()
    return (terms if weight is None else terms * weight.abs()).max().item()


def composed(sample):
    return sample.kwargs.get("activation") is not None or sample.shapes[-1] is not None


SAMPLES = [
    sample((2, 3, 8, 8)),
    sample((2, 5, 17, 19), activation="relu"),
    sample((3, 72, 19, 7), activation="relu", residual=True),
    sample((2, 33, 9, 11), activation="silu", momentum=0.3),
    sample((2, 200, 1, 1), activation="relu6"),
    sample((5, 13), activation="leaky_relu", eps=1e-3),
    sample((3, 4, 50), activation="hardswish", residual=True),
    sample((2, 3, 3, 4, 5), activation="gelu", residual=True),
    sample((1, 1, 90, 91), activation="sigmoid", affine=False),
    sample((2, 130, 6, 5), running=False),
    sample((1, 16, 1, 5000), activation="relu"),
    sample((0, 3, 8, 8)),
    *(
        sample((2, 19, 5, 6), training=False, activation=activation, residual=index % 2 == 0)
        for index, activation in enumerate(ACTIVATIONS)
    ),
    sample((7, 40), training=False, affine=False),
    sample((2, 3, 4, 3, 2), training=False, activation="relu", residual=True),
    sample((0, 3, 8, 8), training=False),
]

GRADCHECK_SAMPLES = [
    sample((3, 2, 2, 2), running=False, activation="silu"),
    *(
        sample((2, 2, 3, 2), running=False, activation=activation, residual=index % 2 == 0)
        for index, activation in enumerate(ACTIVATIONS)
    ),
    sample((4, 3), running=False, affine=False),
    sample((2, 2, 2, 2), activation="relu"),
    *(
        sample((2, 2, 3, 2), training=False, activation=activation, residual=index % 2 == 1)
        for index, activation in enumerate(ACTIVATIONS)
    ),
]

IMAGES = (2, 3, 4, 4)


def _statistics(channels=3):
    return torch.zeros(channels), torch.ones(channels)


BAD_INPUTS = [
    BadInput("rank", lambda f: f(torch.randn(3), *_statistics())),
    BadInput("not a tensor", lambda f: f("image", *_statistics())),
    BadInput("one value per channel", lambda f: f(torch.randn(1, 3), training=True)),
    BadInput("one pixel", lambda f: f(torch.randn(1, 3, 1, 1), *_statistics(), training=True)),
    BadInput("no statistics", lambda f: f(torch.randn(IMAGES))),
    BadInput("half the statistics", lambda f: f(torch.randn(IMAGES), torch.zeros(3))),
    BadInput("running_mean size", lambda f: f(torch.randn(IMAGES), torch.zeros(4), torch.ones(3))),
    BadInput("running_var size", lambda f: f(torch.randn(IMAGES), torch.zeros(3), torch.ones(4))),
    BadInput(
        "running_mean size in training",
        lambda f: f(torch.randn(IMAGES), *_statistics(4), training=True),
    ),
    BadInput("weight size", lambda f: f(torch.randn(IMAGES), *_statistics(), torch.ones(4))),
    BadInput(
        "bias size", lambda f: f(torch.randn(IMAGES), *_statistics(), torch.ones(3), torch.ones(2))
    ),
    BadInput(
        "weight dtype",
        lambda f: f(torch.randn(IMAGES), *_statistics(), torch.ones(3, dtype=torch.float64)),
    ),
    BadInput(
        "statistics dtype",
        lambda f: f(torch.randn(IMAGES).double(), *_statistics(), training=True),
    ),
    BadInput("momentum", lambda f: f(torch.randn(IMAGES), training=True, momentum=None)),
    BadInput("activation", lambda f: f(torch.randn(IMAGES), training=True, activation="tanh")),
    BadInput(
        "residual shape",
        lambda f: f(torch.randn(IMAGES), training=True, residual=torch.randn(2, 3, 4, 1)),
    ),
    BadInput(
        "residual dtype",
        lambda f: f(torch.randn(IMAGES), training=True, residual=torch.randn(IMAGES).double()),
    ),
    BadInput(
        "running_mean that requires grad",
        lambda f: f(torch.randn(IMAGES), torch.zeros(3, requires_grad=True), torch.ones(3)),
    ),
]

CASES = [
    Case(
        "batch_norm",
        own,
        native,
        SAMPLES,
        GRADCHECK_SAMPLES,
        bad_inputs=BAD_INPUTS,
        make_tensors=make_tensors,
        scale=scale,
        composed=composed,
        differentiable=(0, 3, 4, 5),
        mutated=(1, 2),
        reference=reference,
    )
]
