"""Working memory of CPU kernels."""

import subprocess
import sys

import pytest
import torch

import torchops
import torchops.functional as TF
from torchops.bench.memory import peak_memory


def test_winograd_holds_a_block_of_transformed_weights_at_a_time():
    """Those of all 512 x 512 channels would take 16.8 MB, those of 128 output channels 4.2."""
    input, weight = torch.randn(2, 512, 14, 14), torch.randn(512, 512, 3, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torchops.backend("own"), torch.no_grad():
            TF.conv2d(input, weight, padding=1)
            peak = peak_memory(lambda: TF.conv2d(input, weight, padding=1), "cpu")
    finally:
        torch.set_num_threads(threads)
    if peak is None:
        pytest.skip(
            "peak memory cannot be read on this system: it has no resettable /proc/self/clear_refs"
        )
    assert peak < 12e6


_LIMITED = """
import resource, torch, torchops, torchops.functional as TF
torch.set_num_threads({threads})
{prepare}
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {allowed}, used + {allowed}))
{call}
"""


def run_with_memory(prepare, call, allowed, threads=1):
    """In a process of its own that gets `allowed` bytes more than it has before `call`."""
    if not sys.platform.startswith("linux"):
        pytest.skip("address space is limited by Linux's means")
    script = _LIMITED.format(prepare=prepare, call=call, allowed=allowed, threads=threads)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return run.returncode, run.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory_for_a_kernel_raises(threads):
    """The pixels that the stride sees take 17 MB beside 4 MB of output."""
    prepare = "x, w = torch.zeros(8, 256, 91, 91), torch.zeros(64, 256, 1, 1)"
    call = (
        "try: torch.ops.torchops.conv2d(x, w, None, [2, 2], [0, 0], [1, 1], 1)\n"
        "except RuntimeError as error: assert 'not enough memory: a kernel tried' in str(error)\n"
        "else: raise SystemExit('it was enough')"
    )
    assert run_with_memory(prepare, call, 6 << 20, threads) == (0, "")


def test_gradients_of_long_windows_take_no_memory_for_each_tap():
    """30,000 windows of 15,001 taps: a list of them would take 7.2 GB."""
    prepare = "x = torch.randn(1, 1, 30_000, requires_grad=True)"
    call = "TF.max_pool1d(x, 15_001, 1, 7_500).sum().backward()"
    assert run_with_memory(prepare, call, 256 << 20) == (0, "")
