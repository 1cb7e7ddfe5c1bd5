"""backend("auto") hands exactly the tuning table's families to native."""

from itertools import chain

import pytest
import torch

import torchops
import torchops.functional as TF
from torchops import _tuning
from torchops.ops import _drop_in


def wide(input, kernel_size, *args, **kwargs):
    return input.shape[-1] > 100


@pytest.fixture
def native_calls(monkeypatch):
    """The operators that ran natively while the table held one debt."""
    debt = _tuning.Debt("max_pool2d", "cpu", "rows of more than 100", wide, 1.5, "nowhere")
    monkeypatch.setattr(_tuning, "DEBTS", _tuning.by_operator(debt))
    asked = []

    def record(operator, *args, **kwargs):
        preferred = real(operator, *args, **kwargs)
        asked.append((operator, preferred))
        return preferred

    real = _tuning.prefers_native
    monkeypatch.setattr(_drop_in._tuning, "prefers_native", record)
    return asked


def test_auto_follows_the_table(native_calls):
    with torchops.backend("auto"):
        TF.max_pool2d(torch.zeros(1, 1, 4, 101), 2)
        TF.max_pool2d(input=torch.zeros(1, 1, 4, 100), kernel_size=2)
    assert native_calls == [("max_pool2d", True), ("max_pool2d", False)]


def test_other_modes_do_not_ask(native_calls):
    for mode in "own", "native":
        with torchops.backend(mode):
            TF.max_pool2d(torch.zeros(1, 1, 4, 101), 2)
    assert native_calls == []


def test_other_operators_and_devices_are_not_concerned(native_calls):
    assert not _tuning.prefers_native("avg_pool2d", torch.zeros(1, 1, 4, 101), 2)
    assert not _tuning.prefers_native("max_pool2d", torch.zeros(1, 1, 4, 101, device="meta"), 2)


def test_nonsense_keeps_native_error_text(native_calls):
    with torchops.backend("auto"), pytest.raises(RuntimeError, match="tensor expected for input"):
        TF.max_pool2d(torch.zeros(()), 2)


def test_bfloat16_on_the_cpu_is_ours():
    image = torch.zeros(1, 64, 4, 4, dtype=torch.bfloat16)
    for channels in 1, 8, 32, 64:
        assert not _tuning.prefers_native("conv2d", image, torch.zeros(64, channels, 3, 3))
    assert not _tuning.prefers_native("conv1x1", image, torch.zeros(8, 64, 1, 1))


class OnCuda(torch.Tensor):
    device = torch.device("cuda")


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("operator", ["conv1d", "conv2d", "convolution2d", "conv1x1"])
def test_every_dense_convolution_on_cuda_is_handed_over(operator, batched):
    images = (1,) if operator == "conv1d" else (1, 1)

    def asks(channels, per_group):
        size = (8, channels, *images) if batched else (channels, *images)
        input = torch.zeros(size, dtype=torch.bfloat16).as_subclass(OnCuda)
        return _tuning.prefers_native(operator, input, torch.zeros(16, per_group, *images))

    assert asks(16, 16) and asks(16, 4) and asks(1, 1)
    assert not asks(16, 1)


def test_every_committed_debt_is_about_a_kernel():
    for debt in chain(*_tuning.DEBTS.values()):
        assert _drop_in.OPERATORS[debt.operator].own
        assert debt.device in ("cpu", "cuda")
        assert debt.ratio > 1
        assert debt.family and debt.measured
