"""Working memory of CPU kernels."""

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
