"""Every test runs our kernels, on two threads, from a fixed seed; a fallback is an error."""

import pytest
import torch

import torchops


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error::torchops.FallbackWarning")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True, scope="session")
def own_kernels():
    with torchops.backend("own"):
        yield


@pytest.fixture(autouse=True)
def fixed_state():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()
