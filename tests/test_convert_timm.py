"""convert and revert on timm's BatchNormAct2d, of which this is the part that counts."""

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchops
from torchops import _tolerance


class BatchNormAct2d(nn.BatchNorm2d):
    """timm.layers.norm_act's, without its options for scripting."""

    def __init__(self, channels, act_layer=nn.ReLU, drop_layer=nn.Identity):
        super().__init__(channels)
        self.drop, self.act = drop_layer(), act_layer()

    def forward(self, x):
        training = self.training or self.running_mean is None
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    for name in ("timm", "timm.layers", "timm.layers.norm_act"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    module.BatchNormAct2d = BatchNormAct2d
    monkeypatch.setattr(BatchNormAct2d, "__module__", name)


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.SiLU, nn.Identity])
def test_same_numbers_without_calling_the_activation(act_layer, monkeypatch):
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer)).double()
    model = torchops.convert(copy.deepcopy(reference))
    input = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for train in (True, False):
        expected = reference.train(train)(input)
        with monkeypatch.context() as patch:
            patch.setattr(act_layer, "forward", None)
            output = model.train(train)(input)
        assert _tolerance.check(output, expected, dtype=torch.float64)
    assert torch.equal(model[1].num_batches_tracked, reference[1].num_batches_tracked)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)


def test_class_copy_pickle_and_revert():
    model = torchops.convert(BatchNormAct2d(4))
    assert type(model) is not BatchNormAct2d and isinstance(model, BatchNormAct2d)
    input = torch.randn(2, 4, 5, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(twin.eval()(input), model.eval()(input))
    assert type(torchops.revert(model)) is BatchNormAct2d


@pytest.mark.parametrize("parts", [{"act_layer": nn.Mish}, {"drop_layer": nn.Dropout2d}])
def test_what_one_pass_cannot_compute_is_left(parts):
    assert type(torchops.convert(BatchNormAct2d(4, **parts))) is BatchNormAct2d
    hooked = BatchNormAct2d(4)
    hooked.act.register_forward_hook(lambda *_: None)
    assert type(torchops.convert(hooked)) is BatchNormAct2d


def test_convert_twice_is_convert_once():
    model = torchops.convert(torchops.convert(BatchNormAct2d(4)))
    assert type(torchops.revert(model)) is BatchNormAct2d


def test_exchanged_activation_is_honoured():
    model = torchops.convert(BatchNormAct2d(4)).eval()
    model.act = nn.Mish()
    input = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model(input), F.mish(F.batch_norm(
        input, model.running_mean, model.running_var, model.weight, model.bias)))  # fmt: skip
