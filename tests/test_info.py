"""torchops.info(): true, plain data, and readable."""

import json
import subprocess
import sys

import pytest
import torch

import torchops
from torchops import _C, _info, _tuning
from torchops._info import OPERATORS
from torchops.ops import _drop_in


def test_is_plain_data():
    facts = torchops.info()
    assert json.loads(json.dumps(facts)) == facts
    assert list(facts) == ["torchops", "built", "running", "operators", "debts"]


def test_says_what_runs():
    facts = torchops.info()
    assert facts["torchops"] == torchops.__version__
    running = facts["running"]
    assert running["torch"] == torch.__version__
    assert running["isa"] == _C.cpu_isa()
    assert running["threads"] == torch.get_num_threads()
    assert running["isa"] in running["isas"]
    assert set(running["isas"]) <= set(facts["built"]["isas"])
    with torchops.backend("native"):
        assert torchops.info()["running"]["backend"] == "native"


def test_lists_every_operator():
    operators = torchops.info()["operators"]
    assert list(operators) == sorted(torchops.functional.__all__)
    assert set(_drop_in.OPERATORS) <= set(operators)
    for name, covered in operators.items():
        assert covered["kernel"] == OPERATORS[name].own
        assert bool(covered["dtypes"]) == bool(covered["formats"]) == covered["kernel"]


def test_prints_as_text():
    text = str(torchops.info())
    assert f"torchops {torchops.__version__}" in text
    assert torch.__version__ in text
    for name in OPERATORS:
        assert name in text
    assert "{" not in text
    assert max(map(len, text.splitlines())) <= 110


def test_marks_cuda_that_never_ran(monkeypatch):
    monkeypatch.setattr(_C, "CUDA_ARCHS", "80,90a")
    monkeypatch.setattr(_info, "CUDA_VERIFIED_ON", ())
    facts = torchops.info()
    assert facts["built"]["cuda_archs"] == ["80", "90a"]
    devices = facts["operators"]["max_pool2d"]["devices"]
    assert "cuda (never run on a GPU)" in devices
    assert max(map(len, str(facts).splitlines())) <= 110
    assert "never run on a GPU" in str(facts)
    monkeypatch.setattr(_info, "CUDA_VERIFIED_ON", ("H100",))
    assert torchops.info()["operators"]["max_pool2d"]["devices"] == ["cpu", "cuda"]


def test_says_when_built_without_cuda(monkeypatch):
    monkeypatch.setattr(_C, "CUDA_ARCHS", "")
    facts = torchops.info()
    assert not facts["built"]["cuda"]
    assert facts["operators"]["max_pool2d"]["devices"] == ["cpu"]


def test_lists_debts(monkeypatch):
    debt = _tuning.Debt("max_pool2d", "cpu", "1x1 windows", lambda *_: True, 1.25, "one core")
    monkeypatch.setattr(_tuning, "DEBTS", _tuning.by_operator(debt))
    facts = torchops.info()
    assert facts["debts"] == [
        {
            "operator": "max_pool2d",
            "device": "cpu",
            "family": "1x1 windows",
            "ratio": 1.25,
            "measured": "one core",
        }
    ]
    assert "max_pool2d on cpu, 1x1 windows: 1.25x (one core)" in str(facts)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_command(arguments):
    printed = subprocess.run(
        [sys.executable, "-m", "torchops", "info", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert torchops.__version__ in printed
    if arguments:
        assert json.loads(printed)["operators"].keys() == OPERATORS.keys()
