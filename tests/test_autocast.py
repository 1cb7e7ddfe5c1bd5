"""Autocast on the CPU: native's dtypes, and the same bits as an explicit cast."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support import each_small_sample, gradients, results

FORWARD_AND_BACKWARD = pytest.mark.parametrize(
    "compute", [results, gradients], ids=["forward", "backward"]
)
REGIONS = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


def natives_dtypes(case, sample, tensors, dtype, compute):
    """From fake tensors: native's bfloat16 convolution need not survive a real call."""
    with FakeTensorMode() as mode:
        fake = [None if t is None else mode.from_tensor(t) for t in tensors]
        with torch.autocast("cpu", dtype):
            return [result.dtype for result in compute(case, case.native, sample, fake)]


@each_small_sample
@REGIONS
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float64])
@FORWARD_AND_BACKWARD
def test_dtypes_are_natives(case, sample, dtype, input_dtype, compute):
    tensors = case.tensors(sample, input_dtype)
    with torch.autocast("cpu", dtype):
        own = compute(case, case.own, sample, tensors)
    assert [result.dtype for result in own] == natives_dtypes(case, sample, tensors, dtype, compute)


@each_small_sample
@REGIONS
def test_autocast_equals_an_explicit_cast(case, sample, dtype):
    tensors = case.tensors(sample, torch.float32)
    with torch.autocast("cpu", dtype):
        own = results(case, case.own, sample, tensors)
    if own[0].dtype == dtype:
        tensors = [None if t is None else t.to(dtype) for t in tensors]
    expected = results(case, case.own, sample, tensors)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


@each_small_sample
def test_a_disabled_region_inside_changes_nothing(case, sample):
    tensors = case.tensors(sample, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        own = results(case, case.own, sample, tensors)
    expected = results(case, case.own, sample, tensors)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)
