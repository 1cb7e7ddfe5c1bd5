"""What the compiler made of the CUDA kernels: no spills, wide accesses. Needs a build by nvcc."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from test_build import ROOT

LOGS = sorted(ROOT.glob("build/*-release/CMakeFiles/torchops_cuda.dir/csrc/cuda/**/*.cu.o.log"))

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

# Kernels of memory-bound operators. Where one is instantiated for whole packs, it loads 16 bytes at
# a time, and stores nothing narrower: but for sums per channel ("sums"), and the offsets of maxima,
# a byte for each value. (Depthwise kernels take 4 or 8 bytes of channels.)
HOT = {
    "batch_norm_statistics_kernel": "sums",
    "batch_norm_apply_kernel": "tensor",
    "batch_norm_backward_sums_kernel": "sums",
    "batch_norm_backward_apply_kernel": "tensor",
    "max_pool2d_strip_kernel": "tensor and offsets",
    "max_pool2d_patch_kernel": "tensor",
    "max_windows_kernel": "tensor and offsets",
    "max_windows_backward_kernel": "tensor",
    "avg_pool2d_fixed_kernel": "tensor",
    "avg_pool2d_patch_kernel": "tensor",
    "avg_windows_kernel": "tensor",
    "avg_windows_backward_kernel": "tensor",
    "adaptive_avg_pool2d_slab_kernel": "tensor",
    "adaptive_avg_pool2d_plane_kernel": "sums",
}
FILES = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm", "max_pool2d")

# Kernels on tensor cores: they copy to shared memory 16 bytes at a time, and write so if they can.
TENSOR_CORES = {
    "conv2d_tensor_core": {"conv2d_tensor_core_kernel", "conv2d_grad_input_tensor_core_kernel"},
    "conv2d_tensor_core_grad_weight": {"conv2d_grad_weight_tensor_core_kernel"},
}

built = pytest.mark.skipif(not LOGS, reason="built without nvcc: TORCHOPS_CUDA=1 make install")


@built
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


def disassembler():
    """cuobjdump: a part of the CUDA toolkit, or of wheels that install no command."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    for path in (None, *beside, *map(str, wheels)):
        if found := shutil.which("cuobjdump", path=path):
            return found
    return None


disassembled = pytest.mark.skipif(
    disassembler() is None, reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
)


def kernels_of(binary, instructions=("LDG", "STG")):
    """(signature, what it has of these instructions) of every kernel in an object."""
    text = subprocess.run(
        [disassembler(), "-sass", binary], capture_output=True, text=True, check=True
    ).stdout
    _, *bodies = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
    mangled = "\n".join(body.split(maxsplit=1)[0] for body in bodies)
    demangled = subprocess.run(
        ["c++filt"], input=mangled, capture_output=True, text=True, check=True
    )
    found = (re.findall(rf"\b(?:{'|'.join(instructions)})[.\w]*", body) for body in bodies)
    return list(zip(demangled.stdout.splitlines(), found, strict=True))


def takes_packs(signature):
    """Whether a kernel was instantiated for 16 bytes of float, bf16 or f16."""
    return re.search(r"<float, .*\b4\b|f16, .*\b8\b", signature)


@built
@disassembled
@pytest.mark.parametrize("stem", FILES)
def test_hot_kernels_access_16_bytes_at_a_time(stem):
    seen, narrow = 0, []
    for log in LOGS:
        if not log.name.startswith(stem):
            continue
        for signature, accesses in kernels_of(log.with_suffix("")):
            stores = HOT.get(re.search(r"\w*_kernel\b|$", signature)[0])
            if stores is None or not takes_packs(signature):
                continue
            seen += 1
            widths = {"LDG": set(), "STG": set()}
            for access in accesses:
                widths[access[:3]].add(int((re.findall(r"\.(128|64)\b", access) or [32])[0]))
            expected = {128}
            if stores == "tensor and offsets":
                expected |= widths["STG"] & {32 if "<float" in signature else 64}
            if 128 not in widths["LDG"] or (stores != "sums" and widths["STG"] != expected):
                narrow.append((signature, accesses))
    assert seen
    assert not narrow


@built
@disassembled
@pytest.mark.parametrize("stem", TENSOR_CORES)
def test_tensor_cores_are_used_and_fed_16_bytes_at_a_time(stem):
    seen = set()
    for log in LOGS:
        if log.name != f"{stem}.cu.o.log":
            continue
        for signature, found in kernels_of(
            log.with_suffix(""), ("HMMA", "LDSM", "LDGSTS", "STG", "LDL", "STL")
        ):
            name = re.search(r"\w*_kernel\b|$", signature)[0]
            if name not in TENSOR_CORES[stem]:
                continue
            seen.add(name)
            copies = [each for each in found if each.startswith("LDGSTS")]
            assert copies and all(".128" in copy for copy in copies), signature
            # One shape of product, in fp32; operands by ldmatrix, four matrices at a time.
            kinds = {each.split(".")[0] for each in found}
            assert {"HMMA", "LDSM"} <= kinds and not kinds & {"LDL", "STL"}, signature
            assert all(".16816.F32" in each for each in found if each.startswith("HMMA")), signature
            assert all("88.4" in each for each in found if each.startswith("LDSM")), signature
            if "grad_weight" not in name:
                assert any(each.startswith("STG") and ".128" in each for each in found), signature
    assert seen == TENSOR_CORES[stem]
