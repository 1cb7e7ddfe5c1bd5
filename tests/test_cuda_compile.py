"""What the compiler reported of every CUDA kernel: no spills, no stack. Needs a build with nvcc."""

import re

import pytest

from test_build import ROOT

LOGS = sorted(ROOT.glob("build/*-release/CMakeFiles/torchops_cuda.dir/csrc/cuda/**/*.cu.o.log"))

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.skipif(not LOGS, reason="built without nvcc: TORCHOPS_CUDA=1 make install")
@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.name.removesuffix(".cu.o.log"))
def test_no_kernel_spills(log):
    kernels = [match.groupdict() for match in KERNEL.finditer(log.read_text())]
    assert kernels, "no resource report: was -Xptxas=-v dropped?"
    spilling = [
        f"{kernel['name']} ({kernel['arch']}, {kernel['registers']} registers)"
        for kernel in kernels
        if int(kernel["stores"]) or int(kernel["loads"])
    ]
    assert not spilling
