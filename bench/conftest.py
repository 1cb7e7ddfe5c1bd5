"""Options of `pytest bench/`: the same problem lists as `torchops bench`.

    pytest bench/ --benchmark-group-by=param:problem --benchmark-json=results.json
    pytest bench/ --suite mobilenet_v2 --batch 4 --dtype bfloat16 --layout channels_last -k bwd

Grouped by param:problem, each group holds ours and native on one problem; by param:library, each
holds one of the two on all problems.
"""

import pytest
import torch

from torchops.bench.memory import settle_allocator
from torchops.bench.suites import ALL, suite
from torchops.bench.workload import LAYOUTS, Setting, has_layout

DTYPES = ("float32", "bfloat16", "float16", "float64")


def pytest_addoption(parser):
    group = parser.getgroup("torchops")
    group.addoption("--suite", default="lenet", help=f"a network, such as {', '.join(ALL)}")
    group.addoption("--batch", type=int, default=8)
    group.addoption("--dtype", choices=DTYPES, default="float32")
    group.addoption("--layout", choices=LAYOUTS, default="contiguous")
    group.addoption("--device", default="cpu")
    group.addoption("--threads", type=int, default=1, help="1 is pinned to a core")


def pytest_generate_tests(metafunc):
    if "problem" in metafunc.fixturenames:
        option = metafunc.config.option
        problems = suite(option.suite, batch=option.batch)
        listed = [problem for problem in problems if has_layout(problem, option.layout)]
        metafunc.parametrize("problem", listed, ids=str)


def pytest_configure():
    settle_allocator()


@pytest.fixture
def setting(request):
    option = request.config.option
    return Setting(getattr(torch, option.dtype), option.layout, option.device)
