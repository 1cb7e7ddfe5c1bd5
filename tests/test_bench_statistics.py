"""Medians, spreads, verdicts, and the engine that takes the samples."""

import math
import os
import time

import pytest
import torch

from bench_sample import around
from torchops.bench.statistics import (
    FASTER,
    SAME,
    SLOWER,
    UNCERTAIN,
    Speed,
    Summary,
    geometric_mean,
    speed_of_pairs,
    speed_of_times,
    summarize,
    verdict,
)
from torchops.bench.steps import rotation
from torchops.bench.timing import Effort, clock_for, measure, thread_clock, threads, wall_clock


def test_summary():
    assert summarize([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert summarize([7.0]) == Summary(7.0, 7.0, 7.0, 1)
    assert summarize([1.0, 2.0]) == Summary(1.5, 1.25, 1.75, 2)
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_one_slow_sample_moves_neither_median_nor_quartiles():
    assert summarize([1.0] * 9 + [1000.0]) == Summary(1.0, 1.0, 1.0, 10)


def test_notch_narrows_with_the_root_of_the_samples():
    assert Summary(1.0, 0.9, 1.1, 4).notch == pytest.approx(1.57 * 0.2 / 2)
    assert Summary(1.0, 0.9, 1.1, 16).notch == pytest.approx(1.57 * 0.2 / 4)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (Speed(1.0, 0.99, 1.01), SAME),
        (Speed(1.03, 1.02, 1.04), SAME),
        (Speed(1.0, 0.90, 1.10), UNCERTAIN),
        (Speed(1.2, 1.1, 1.3), FASTER),
        (Speed(1.2, 0.9, 1.5), UNCERTAIN),
        (Speed(1.06, 1.01, 1.11), FASTER),
        (Speed(1.04, 1.01, 1.07), UNCERTAIN),
        (Speed(0.8, 0.7, 0.9), SLOWER),
        (Speed(0.8, 0.5, 1.1), UNCERTAIN),
        (Speed(0.94, 0.93, 0.96), SLOWER),
        (Speed(0.96, 0.94, 0.98), UNCERTAIN),
    ],
)
def test_verdict(speed, expected):
    assert verdict(speed) == expected


def test_verdict_is_fair_to_both_sides():
    for low, ratio, high in [(0.7, 0.8, 0.9), (0.97, 1.0, 1.03), (0.9, 1.0, 1.2), (0.5, 0.8, 1.1)]:
        there = verdict(Speed(ratio, low, high))
        back = verdict(Speed(1 / ratio, 1 / high, 1 / low))
        mirrored = {FASTER: SLOWER, SLOWER: FASTER}
        assert back == mirrored.get(there, there)


def test_band_moves_the_verdict():
    speed = Speed(0.92, 0.91, 0.93)
    assert verdict(speed, 0.95) == SLOWER
    assert verdict(speed, 0.90) == SAME


def test_speed_of_times():
    speed = speed_of_times(candidate=around(1.0, 0.01), base=around(2.0, 0.01))
    assert speed.ratio == 2.0
    assert speed.low < 2.0 < speed.high
    assert speed_of_times(Summary(1.0, 0.0, 4.0, 1), around(1.0)).high == math.inf


def test_speed_of_pairs_ignores_what_both_share():
    """A machine that halves its speed in mid-run spreads times, not ratios."""
    ours = [1.0] * 5 + [2.0] * 5
    peer = [3 * time for time in ours]
    ratios = summarize([b / a for a, b in zip(ours, peer, strict=True)])
    assert speed_of_pairs(ratios) == Speed(3.0, 3.0, 3.0)
    assert speed_of_times(summarize(ours), summarize(peer)).low < 2.0


def test_geometric_mean():
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


class FakeClock:
    """Every step takes the time that it is told to, and the order of calls is noted."""

    def __init__(self, **seconds):
        self.seconds = seconds
        self.order = []

    def __call__(self, step, calls):
        self.order.append((step(), calls))
        return self.seconds[step()]


EFFORT = Effort(seconds=0.0, fewest=4, most=9, sample_seconds=1.0, warm_up_seconds=2.0)


def test_samples_are_interleaved():
    clock = FakeClock(ours=0.5, eager=2.0)
    samples = measure({"ours": lambda: "ours", "eager": lambda: "eager"}, clock, EFFORT)
    assert samples == {"ours": [0.5] * 4, "eager": [2.0] * 4}
    there_and_back = ["ours", "eager", "eager", "ours"]
    assert [name for name, _ in clock.order[-8:]] == there_and_back * 2


def test_short_steps_are_called_several_times_per_sample():
    clock = FakeClock(ours=0.3, eager=2.0)
    measure({"ours": lambda: "ours", "eager": lambda: "eager"}, clock, EFFORT)
    assert dict(clock.order[-2:]) == {"ours": 4, "eager": 1}


def test_rounds_end_with_the_time_or_the_limit():
    long = Effort(seconds=60.0, fewest=2, most=7, sample_seconds=0.0, warm_up_seconds=0.0)
    assert len(measure({"ours": lambda: "ours"}, FakeClock(ours=1.0), long)["ours"]) == 7


def test_clocks():
    def step():
        time.sleep(5e-3)

    assert wall_clock(step, 2) >= 5e-3
    assert thread_clock(step, 2) < 2.5e-3
    with threads(1):
        assert clock_for("cpu") is thread_clock
    with threads(2):
        assert clock_for("cpu") is wall_clock


def test_one_thread_is_pinned_and_released():
    cores, before = os.sched_getaffinity(0), torch.get_num_threads()
    with threads(1):
        assert len(os.sched_getaffinity(0)) == 1
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == before


def test_rotation_reaches_its_target():
    assert rotation(100, 1000) == 10
    assert rotation(101, 1000) == 10
    assert rotation(5000, 1000) == 1
    assert rotation(100, 0) == 1
