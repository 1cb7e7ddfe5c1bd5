"""Where a measurement was taken: hardware, threads, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Environment:
    """Everything that a figure depends on and that is not in the figure's own row."""

    cpu: str
    isa: str
    cores: int
    gpu: str
    last_level_cache: int
    system: str
    python: str
    torch: str
    torchops: str
    commit: str


def environment(device: str) -> Environment:
    """The environment of a run on `device`."""
    import torchops

    cuda = torch.device(device).type == "cuda"
    return Environment(
        cpu=_cpu_model(),
        isa=_isa(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _all_cores(),
        gpu=torch.cuda.get_device_name(device) if cuda else "",
        last_level_cache=last_level_cache(device),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        torch=torch.__version__,
        torchops=torchops.__version__,
        commit=_commit(),
    )


def _all_cores() -> int:
    return os.cpu_count() or 1


class Others:
    """What other processes take of the processor, from construction on.

    Their work slows ours down, and with several threads a wait for one that was put aside turns
    a time into multiples of the scheduler's tick. Virtual machines' stolen time counts as theirs.
    """

    def __init__(self) -> None:
        self._start = _processor_seconds()

    def cores(self) -> float | None:
        """How many cores they used on average; None where the system does not tell."""
        end = _processor_seconds()
        if self._start is None or end is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self._start, end, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0


def _processor_seconds() -> tuple[float, float, float] | None:
    """Elapsed, and what all processes and this one have computed."""
    try:
        ticks = [int(field) for field in _STAT.read_text().split(maxsplit=9)[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupt, soft_interrupt, stolen = ticks
    busy = user + nice + system + interrupt + soft_interrupt + stolen
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


@cache
def last_level_cache(device: str) -> int:
    """Bytes of the largest cache in front of the device's memory; 0 where unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in _CPUS.glob("cpu0/cache/index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes)


def _cpu_model() -> str:
    """Its name, and its numbers: virtual machines shorten one name for several generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _isa() -> str:
    from torchops import _C

    return _C.cpu_isa()


def _commit() -> str:
    """The commit of the source folder that torchops is imported from, "+" when it was edited."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
