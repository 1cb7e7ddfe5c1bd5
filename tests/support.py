"""What the aspects share: parameters over all cases, and one call of a case as plain results."""

import pytest
import torch

from cases import FLOATS, all_cases
from torchops._tolerance import assert_close

CASES = all_cases()
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _named(case, sample):
    return pytest.param(case, sample, id=f"{case.name}-{sample}")


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_sample = pytest.mark.parametrize(
    ("case", "sample"), [_named(case, sample) for case in CASES for sample in case.samples]
)
each_nonempty_sample = pytest.mark.parametrize(
    ("case", "sample"),
    [
        _named(case, sample)
        for case in CASES
        for sample in case.samples
        if 0 not in sample.shapes[0]
    ],
)
each_small_sample = pytest.mark.parametrize(
    ("case", "sample"),
    [_named(case, sample) for case in CASES for sample in case.gradcheck_samples],
)
each_first_sample = pytest.mark.parametrize(
    ("case", "sample"), [_named(case, case.gradcheck_samples[0]) for case in CASES]
)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
each_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


def positions(case, tensors):
    """Where the differentiable arguments stand."""
    where = range(len(tensors)) if case.differentiable is None else case.differentiable
    return [position for position in where if tensors[position] is not None]


def poison_free_memory():
    """Fill what malloc will hand out next with NaN: who reads what nobody wrote, gets caught."""
    blocks = [
        torch.full((2**exponent,), float("nan"), dtype=torch.float64)
        for exponent in range(3, 15)
        for _ in range(4)
    ]
    del blocks


def invoke(case, function, sample, tensors):
    """Outputs of one call as a tuple, then the arguments it updated (copies: `tensors` stay)."""
    poison_free_memory()
    tensors = list(tensors)
    updated = [position for position in case.mutated if tensors[position] is not None]
    for position in updated:
        tensors[position] = tensors[position].clone()
    outputs = function(*tensors, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, tuple(tensors[position] for position in updated)


def results(case, function, sample, tensors):
    """Everything one call gives, without derivatives."""
    with torch.no_grad():
        outputs, updated = invoke(case, function, sample, tensors)
    return outputs + updated


def as_function(case, function, sample, tensors):
    """A call as a pure function of its differentiable arguments, and those arguments.

    It returns the floating-point output, or a tuple where there are several.
    """
    where = positions(case, tensors)

    def call(*inputs):
        arguments = list(tensors)
        for position, input in zip(where, inputs, strict=True):
            arguments[position] = input
        outputs, _ = invoke(case, function, sample, arguments)
        outputs = tuple(output for output in outputs if output.is_floating_point())
        return outputs[0] if len(outputs) == 1 else outputs

    return call, [tensors[position] for position in where]


def gradients(case, function, sample, tensors, seed=1, like_output=False):
    """The gradient of every differentiable argument, for one random grad_output.

    It is contiguous, or `like_output` has the output's own strides, as in a network.
    """
    call, inputs = as_function(case, function, sample, tensors)
    inputs = [input.detach().requires_grad_() for input in inputs]
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    grad_outputs = [  # of values that every dtype holds exactly
        torch.randn(output.shape, generator=generator).bfloat16().to(output.dtype)
        for output in outputs
    ]
    poison_free_memory()
    if like_output:
        grad_outputs = [
            torch.empty_like(output).copy_(grad)
            for output, grad in zip(outputs, grad_outputs, strict=True)
        ]
    return torch.autograd.grad(outputs, inputs, grad_outputs)


def doubles(tensors, dtype=None):
    """The same values in float64 (rounded to `dtype` first)."""
    return [None if t is None else t.to(dtype or t.dtype).double() for t in tensors]


def largest_finite(tensor):
    magnitudes = tensor.detach().abs()
    return magnitudes[magnitudes.isfinite()].max().item() if magnitudes.isfinite().any() else 0.0


def assert_within_rule(case, sample, tensors, dtype, compute, own=None):
    """`compute(case, function, sample, tensors)` of ours against float64, under the tolerance rule.

    `own` gives results that were computed already.
    """
    if own is None:
        own = compute(case, case.own, sample, tensors)
    reference = compute(case, case.native, sample, doubles(tensors))
    native = [None] * len(own)
    if dtype in case.native_dtypes and dtype != torch.float64:
        native = compute(case, case.native, sample, tensors)
    cancelling = case.scale(sample, tensors) if case.scale else 0.0
    assert len(own) == len(reference)
    for index, (ours, exact, theirs) in enumerate(zip(own, reference, native, strict=True)):
        if not ours.is_floating_point():
            assert torch.equal(ours, exact)
            continue
        assert ours.dtype == (dtype if theirs is None else theirs.dtype)
        scale = max(cancelling, largest_finite(exact))
        assert_close(ours, exact, theirs, scale=scale, name=f"result {index}")
