"""Kernels compute with nothing that nobody wrote: working memory is filled with subnormal numbers,
and the flag of the processor for a subnormal operand must stay down.

Such lanes do no harm to results that do not contain them, but Intel's CPUs take up to twenty times
as long for a multiplication with a subnormal number.
"""

import ctypes
import platform

import pytest
import torch

import torchops
from support import each_format, each_nonempty_sample, positions

DENORMAL_OPERAND = 2  # a sticky flag of x86's MXCSR

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="reads x86's floating-point flags through glibc",
)


class FloatingPointEnvironment:
    """This thread's MXCSR, through glibc: fenv_t holds it in its last four bytes."""

    def __init__(self):
        self._libm = ctypes.CDLL("libm.so.6")
        self._environment = (ctypes.c_uint32 * 8)()

    def clear(self):
        self._libm.fegetenv(self._environment)
        self._environment[7] &= ~DENORMAL_OPERAND
        self._libm.fesetenv(self._environment)

    def met_subnormal(self):
        self._libm.fegetenv(self._environment)
        return bool(self._environment[7] & DENORMAL_OPERAND)


def subnormal_free_memory():
    """Fill what malloc will hand out next with subnormal numbers, of float32 and of float64."""
    blocks = [
        torch.full((2**exponent,), 1, dtype=torch.int32)
        for exponent in range(5, 20)
        for _ in range(4)
    ]
    del blocks


@each_format
@each_nonempty_sample
def test_no_subnormal_operand(case, sample, memory_format):
    if "max" in case.name:
        pytest.skip("compares and adds, which subnormal numbers do not slow down")
    if sample.kwargs.get("activation") not in (None, "relu", "relu6", "leaky_relu"):
        pytest.skip("the exponential of an activation may be subnormal")
    tensors = case.tensors(sample, torch.float32, memory_format)
    for position in positions(case, tensors):
        tensors[position].requires_grad_()
    threads = torch.get_num_threads()
    environment = FloatingPointEnvironment()
    torch.set_num_threads(1)
    try:
        with torchops.backend("own"):
            subnormal_free_memory()
            environment.clear()
            output = case.own(*tensors, **sample.kwargs)
            forward = environment.met_subnormal()
            output = output[0] if isinstance(output, tuple) else output
            grad_output = torch.ones_like(output)
            subnormal_free_memory()
            environment.clear()
            if output.requires_grad:
                output.backward(grad_output)
            backward = environment.met_subnormal()
    finally:
        torch.set_num_threads(threads)
    assert not forward
    assert not backward
