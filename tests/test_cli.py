"""The command line, and `torchops verify` as the check of a machine."""

import subprocess
import sys

import pytest
import torch

import torchops
import torchops.functional as TF
from torchops import _verify
from torchops.__main__ import COMMANDS, main
from torchops._info import OPERATORS
from torchops.ops._drop_in import Operator


def own_operators():
    return {name for name, operator in OPERATORS.items() if operator.own}


# ---- torchops --------------------------------------------------------------------------------


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_version():
    printed = subprocess.run(
        [sys.executable, "-m", "torchops", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert printed == f"torchops {torchops.__version__}\n"


def test_unknown_command(capsys):
    message = usage_error(capsys, "verfy")
    assert "verfy" in message
    for name in COMMANDS:
        assert name in message


def test_no_command(capsys):
    assert "COMMAND" in usage_error(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: torchops {command}" in capsys.readouterr().out


# ---- torchops verify -------------------------------------------------------------------------


def test_every_operator_with_kernels_has_problems():
    assert own_operators() == set(_verify.PROBLEMS)


def test_verify_passes(capsys):
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "✗" not in printed
    for name in own_operators():
        assert name in printed


def test_verify_one_operator(capsys):
    assert main(["verify", "--quick", "--op", "max_pool2d"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("max_pool")]
    assert [row.split()[:2] for row in rows] == [
        ["max_pool2d", "contiguous"],
        ["max_pool2d", "channels_last"],
    ]
    assert all(row.count("✓") == len(_verify.DTYPES) for row in rows)


def test_verify_unknown_operator(capsys):
    message = usage_error(capsys, "verify", "--op", "conv17d")
    assert "conv17d" in message
    assert "max_pool2d" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_verify_without_a_gpu(capsys):
    assert "sees no CUDA device" in usage_error(capsys, "verify", "--device", "cuda")


def wrong_forward(input, *args, **kwargs):
    return torch.nn.functional.max_pool2d(input, *args, **kwargs) * 1.01


def wrong_gradient(input, *args, **kwargs):
    return torch.nn.functional.max_pool2d(input * 2 - input.detach(), *args, **kwargs)


def raising(input, *args, **kwargs):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    "function, reason",
    [
        (wrong_forward, "output: error"),
        (wrong_gradient, "grad of input"),
        (raising, "no such kernel"),
    ],
)
def test_verify_finds_a_wrong_kernel(monkeypatch, capsys, function, reason):
    monkeypatch.setattr(TF, "max_pool2d", function)
    assert main(["verify", "--quick", "--op", "max_pool2d"]) == 1
    printed = capsys.readouterr().out
    assert "✗ max_pool2d contiguous torch.float32" in printed
    assert reason in printed


def test_verify_cannot_pass_on_native_calls(monkeypatch, capsys):
    """A wrapper that falls back warns in mode "own", and verify takes that for a miss."""

    def fallen_back(*args, **kwargs):
        torchops._backend.warn_fallback("max_pool2d", "this test")
        return torch.nn.functional.max_pool2d(*args, **kwargs)

    monkeypatch.setattr(torchops._backend, "_warned", set())
    monkeypatch.setattr(TF, "max_pool2d", fallen_back)
    assert main(["verify", "--quick", "--op", "max_pool2d"]) == 1
    assert "FallbackWarning" in capsys.readouterr().out


def test_verify_mentions_an_operator_without_problems(monkeypatch, capsys):
    monkeypatch.setitem(OPERATORS, "new_op", Operator("new_op", None, own=True))
    assert main(["verify", "--op", "new_op"]) == 1
    assert "torchops/_verify.py has no problem for it" in capsys.readouterr().out
