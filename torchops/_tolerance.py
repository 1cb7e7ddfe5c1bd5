"""The tolerance rule of tests, verify and bench: how far from the exact result an answer may be.

    error(ours) <= 2 * min(error(native), CAP * k ulps) + k ulps

Errors are the largest absolute difference from a reference that was computed in float64 from the
same input values. One ulp is the spacing of the dtype at the output's scale, and the scale is the
largest magnitude of the reference, or of the terms that cancel in it (pass `scale` then: the mean
of a normalised input is 0, but what was subtracted to get there was not).

k is 1 for bfloat16 and float16, where one final rounding hides every float32 sum; 16 for float32,
because two correct kernels add in different orders; 256 for float64, where the reference is itself
only native float64. Native's own error counts, since a layer that is as good as the one it
replaces is good enough, but only up to a cap: native has open wrong-result bugs in bfloat16
convolutions, and a wrong peer must not excuse a wrong answer.

NaN must stand where the reference has NaN, and an infinity where the reference, rounded to the
dtype, has the same infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ULPS = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 16, torch.float64: 256}

CAP = 4
"""Native's error counts up to CAP * k ulps."""


@dataclass(frozen=True)
class Result:
    """Outcome of one comparison; true when the answer is within the rule.

    `error` and `allowed` are absolute; `ulp` is the unit that turns them into ulps of the output's
    scale. `reason` is empty when ok, else a sentence for people.
    """

    ok: bool
    error: float
    allowed: float
    ulp: float
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    @property
    def ulps(self) -> float:
        """The error in ulps of the output's scale."""
        return self.error / self.ulp if self.error else 0.0


def ulp(scale: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype`'s numbers at magnitude `scale`, never below its smallest subnormal."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    if scale < info.tiny:
        return smallest
    return info.eps * 2.0 ** (math.frexp(min(scale, info.max))[1] - 1)


def check(
    actual: Tensor,
    reference64: Tensor,
    native: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> Result:
    """Compare `actual` with the float64 reference under the tolerance rule.

    `native` is the same result computed by torch in the same dtype, or None where native has no
    such result or is not trusted to live. `dtype` is the dtype whose rounding counts and defaults
    to `actual`'s own. `scale` defaults to the largest finite magnitude of the reference.
    """
    dtype = dtype or actual.dtype
    if dtype not in ULPS:
        known = ", ".join(map(str, ULPS))
        raise TypeError(f"no tolerance is defined for {dtype}; expected one of {known}")
    reference = reference64.detach().double()
    if actual.shape != reference.shape:
        return _failure(
            f"shape {tuple(actual.shape)} where the reference has {tuple(reference.shape)}"
        )

    if scale is None:
        scale = _largest_finite(reference)
    unit = ulp(scale, dtype)
    slack = ULPS[dtype] * unit
    allowed = slack
    if native is not None:
        allowed += 2 * min(_error(native, reference, dtype), CAP * slack)

    error = _error(actual, reference, dtype)
    if error <= allowed:
        return Result(True, error, allowed, unit)
    if math.isinf(error):
        return _failure("NaN or infinity stands where the reference has none, or the reverse")
    reason = f"error {error:.3g} is {error / unit:.3g} ulps of {scale:.3g}; allowed {allowed:.3g}"
    return Result(False, error, allowed, unit, reason)


def assert_close(
    actual: Tensor,
    reference64: Tensor,
    native: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    name: str = "result",
) -> None:
    """Raise AssertionError, naming `name`, unless `check` accepts."""
    result = check(actual, reference64, native, dtype=dtype, scale=scale)
    if not result:
        raise AssertionError(f"{name}: {result.reason}")


def _failure(reason: str) -> Result:
    return Result(False, math.inf, 0.0, 1.0, reason)


def _largest_finite(tensor: Tensor) -> float:
    magnitudes = torch.where(tensor.isfinite(), tensor.abs(), 0.0)
    return magnitudes.max().item() if magnitudes.numel() else 0.0


def _error(actual: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Largest absolute difference, or infinity where NaNs or infinities disagree."""
    if reference.numel() == 0:
        return 0.0
    actual = actual.detach().to(reference)
    difference = (actual - reference).abs_()
    finite = difference.isfinite()
    if not finite.all():
        # Rounded first: a sum that overflows float16 is an infinity in an exact kernel too.
        expected = reference.to(dtype).double()
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        if not (finite | same).all():
            return math.inf
        difference = torch.where(finite, difference, 0.0)
    return difference.max().item()
