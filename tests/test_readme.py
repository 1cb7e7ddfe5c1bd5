"""README's Python runs as it stands, and the commands it names exist."""

import re
from pathlib import Path

import pytest
import torch

from torchops.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def reader():
    """What README's reader has at hand; its blocks follow each other."""
    return {
        "torch": torch,
        "model": torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        ),
        "input": torch.randn(2, 4, 8, 8),
        "weight": torch.randn(4, 4, 3, 3),
        "mean": torch.zeros(4),
        "var": torch.ones(4),
    }


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_python_runs(block, reader):
    exec(BLOCKS[block], reader)


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets
    assert set(re.findall(r"^torchops ([a-z]+)", README, re.MULTILINE)) <= set(COMMANDS)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
