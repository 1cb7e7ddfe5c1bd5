"""Every instruction set this CPU has gives right results, and none leaks into shared code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import torchops
from support import assert_within_rule, each_format, each_sample, gradients, results
from torchops import _C

LIBRARY = Path(torchops.__file__).with_name("libtorchops.so")


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


@each_sample
@each_format
def test_results(isa, case, sample, memory_format):
    assert _C.cpu_isa() == isa
    for dtype in case.dtypes:
        tensors = case.tensors(sample, dtype, memory_format)
        assert_within_rule(case, sample, tensors, dtype, results)
        assert_within_rule(case, sample, tensors, dtype, gradients)


def test_an_unknown_isa_names_the_known_ones():
    with pytest.raises(ValueError, match="'sse9' is not available here.*baseline"):
        _C.set_cpu_isa("sse9")


def tool(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (package binutils)")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def shared_functions():
    """Names of functions outside the ISA namespaces that the linker may share between files."""
    names = set()
    for line in tool("nm", "--defined-only", str(LIBRARY)).splitlines():
        kind, name = line.split()[-2:]
        if kind in "TWu" and not re.search(r"torchops3cpu(4avx2|6avx512)", name):
            names.add(name)
    return names


@pytest.mark.skipif("avx2" not in _C.cpu_isas(), reason="only one ISA here")
def test_shared_functions_hold_no_instruction_of_a_later_isa():
    """An AVX-512 copy of an inline function, picked by the linker for all, kills older CPUs."""
    shared = shared_functions()
    assert shared
    function, found = None, set()
    for line in tool("objdump", "-d", "--no-show-raw-insn", str(LIBRARY)).splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = heading[1]
        elif function in shared and re.search(r":\s+(v[a-z]+|k[a-z]+[bwdq])\s|%[yz]mm", line):
            found.add(function)
    assert not found
