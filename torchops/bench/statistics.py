"""What a list of timings says: median, spread, and whether two of them differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FASTER, SAME, SLOWER, UNCERTAIN = "FASTER", "SAME", "SLOWER", "UNCERTAIN"

BAND = 0.95
"""Speeds between BAND and 1 / BAND are the same."""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of `samples` values."""

    median: float
    q1: float
    q3: float
    samples: int

    @property
    def notch(self) -> float:
        """Half the width of the 95 % interval of the median, 1.57 IQR / sqrt(n).

        McGill, Tukey, Larsen (1978), Variations of box plots: two medians differ at the 5 % level
        when their notches do not overlap.
        """
        return 1.57 * (self.q3 - self.q1) / math.sqrt(self.samples)


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles of `values`, with linear interpolation between neighbours."""
    if not values:
        raise ValueError("no samples to summarize")
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, q1, q3, len(values))


@dataclass(frozen=True)
class Speed:
    """How many times as fast the candidate is, with the interval that the spreads allow."""

    ratio: float
    low: float
    high: float


def speed_of_pairs(ratios: Summary) -> Speed:
    """Speed from the ratios of neighbouring samples, in which a machine's drift cancels."""
    return Speed(ratios.median, ratios.median - ratios.notch, ratios.median + ratios.notch)


def speed_of_times(candidate: Summary, base: Summary) -> Speed:
    """Speed of `candidate` over `base` from times that were taken apart from each other."""
    fastest = candidate.median - candidate.notch
    return Speed(
        base.median / candidate.median,
        (base.median - base.notch) / (candidate.median + candidate.notch),
        (base.median + base.notch) / fastest if fastest > 0 else math.inf,
    )


def verdict(speed: Speed, band: float = BAND) -> str:
    """FASTER, SLOWER, SAME, or UNCERTAIN where the spreads allow more than one of them."""
    if speed.low >= band and speed.high <= 1 / band:
        return SAME
    if speed.ratio > 1 / band and speed.low > 1:
        return FASTER
    if speed.ratio < band and speed.high < 1:
        return SLOWER
    return UNCERTAIN


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios: a factor 2 and a factor 1/2 cancel."""
    return math.exp(statistics.fmean(map(math.log, values)))
