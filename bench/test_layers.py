"""pytest-benchmark over the layers of a network; see conftest.py for the options."""

import pytest
import torch

import torchops
from torchops.bench import native
from torchops.bench.counts import count
from torchops.bench.steps import step
from torchops.bench.timing import threads
from torchops.bench.workload import Workload, forward

LIBRARIES = {"ours": torchops.functional, "native": native}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_layer(benchmark, request, problem, direction, library, setting):
    call = step(forward(LIBRARIES[library], problem), direction, [Workload(problem, setting)])
    # On a GPU a call only queues its kernels.
    cuda = torch.device(setting.device).type == "cuda"

    def timed():
        call()
        if cuda:
            torch.cuda.synchronize(setting.device)

    with torchops.backend("own"), threads(request.config.option.threads):
        benchmark(timed)

    counts = count(problem, setting.dtype, direction)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        input_shape=problem.input_shape,
        output_shape=problem.output_shape,
        family=problem.family,
        direction=direction,
        gflop_per_s=counts.flops / seconds / 1e9,
        gb_per_s=counts.bytes / seconds / 1e9,
    )
