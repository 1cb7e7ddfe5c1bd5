"""The tolerance rule itself: what it accepts and refuses, and that a wrong peer excuses nothing."""

import math

import pytest
import torch

from torchops import _tolerance
from torchops._tolerance import CAP, ULPS, assert_close, check, ulp

DTYPES = list(ULPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0, 4096.0, 1e-3])
def test_ulp_is_the_spacing_of_the_dtype(dtype, scale):
    value = torch.tensor(scale, dtype=dtype)
    # The spacing above a power of two holds for its whole binade, so measure it there.
    base = torch.tensor(2.0 ** math.floor(math.log2(value.item())), dtype=dtype)
    above = torch.nextafter(base, torch.tensor(math.inf, dtype=dtype))
    assert ulp(value.item(), dtype) == above.double().item() - base.double().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_of_nothing_is_the_smallest_subnormal(dtype):
    smallest = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    assert ulp(0.0, dtype) == smallest.double().item() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_k_ulps_pass_and_one_more_fails(dtype):
    reference = torch.tensor([0.25, 1.0], dtype=torch.float64)
    unit = torch.finfo(dtype).eps
    for ulps, ok in ((ULPS[dtype], True), (ULPS[dtype] + 1, False)):
        actual = reference.clone()
        actual[1] += ulps * unit
        result = check(actual.to(dtype), reference)
        assert bool(result) is ok
        assert result.ulps == ulps
        assert (result.reason == "") is ok


def test_natives_error_counts_twice():
    reference = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    native = (reference + 10 * eps).float()
    assert check((reference + 36 * eps).float(), reference, native)
    assert not check((reference + 37 * eps).float(), reference, native)


def test_natives_error_counts_only_up_to_the_cap():
    reference = torch.ones(4, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    for native in (torch.full((4,), 100.0), torch.full((4,), math.nan)):
        native = native.bfloat16()
        assert check((reference + (2 * CAP + 1) * eps).bfloat16(), reference, native)
        assert not check((reference + (2 * CAP + 2) * eps).bfloat16(), reference, native)


def test_scale_of_cancelling_terms():
    reference = torch.tensor([1e-9], dtype=torch.float64)
    actual = torch.tensor([1e-6], dtype=torch.float32)
    assert not check(actual, reference)
    assert check(actual, reference, scale=1.0)


@pytest.mark.parametrize(
    ("actual", "reference", "ok"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.nan, 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [math.nan, 1.0], False),
        ([math.inf, 1.0], [math.inf, 1.0], True),
        ([-math.inf, 1.0], [math.inf, 1.0], False),
        ([math.nan, 1.0], [math.inf, 1.0], False),
    ],
)
def test_not_finite(actual, reference, ok):
    assert bool(check(torch.tensor(actual), torch.tensor(reference, dtype=torch.float64))) is ok


def test_overflow_of_the_dtype_is_right():
    reference = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert check(torch.tensor([math.inf, 1.0], dtype=torch.float16), reference)
    assert not check(torch.tensor([-math.inf, 1.0], dtype=torch.float16), reference)
    assert not check(torch.tensor([65504.0, 1.0], dtype=torch.float16), torch.ones(2))


def test_wrong_shape_is_a_failure_with_a_reason():
    result = check(torch.ones(2, 3), torch.ones(3, 2))
    assert not result
    assert "(2, 3)" in result.reason
    assert "(3, 2)" in result.reason


def test_empty_is_exact():
    assert check(torch.empty(0, 3), torch.empty(0, 3)).error == 0.0


def test_unknown_dtype_says_what_is_allowed():
    with pytest.raises(TypeError, match="int64.*expected one of torch.bfloat16"):
        check(torch.ones(2, dtype=torch.int64), torch.ones(2))


def test_assert_close_names_the_result():
    assert_close(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="grad_weight: error 1 is"):
        assert_close(torch.full((2,), 2.0), torch.ones(2), name="grad_weight")


def test_a_real_convolution_passes():
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 8, 9, 9, generator=generator)
    weight = torch.randn(4, 8, 3, 3, generator=generator)
    native = torch.conv2d(input, weight)
    assert _tolerance.check(native, torch.conv2d(input.double(), weight.double()))
