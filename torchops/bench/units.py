"""Numbers for people: three significant digits and a unit."""

from __future__ import annotations

_Units = tuple[tuple[float, str], ...]

_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def seconds(value: float) -> str:
    """Such as "1.23 ms"."""
    return _scaled(value, _TIME)


def spread(median: float, low: float, high: float) -> str:
    """A time and its range in one unit, such as "1.23 ms [1.20–1.31]"."""
    factor, _ = _unit(median, _TIME)
    ends = f"{significant(low / factor)}–{significant(high / factor)}"
    return f"{seconds(median)} [{ends}]"


def size(value: float) -> str:
    """Bytes in powers of ten, such as "12.8 MB", so that they divide by GB/s without a factor."""
    return _scaled(value, _DECIMAL) + "B" if value else "0 B"


def rate(value: float, unit: str) -> str:
    """Such as "81.2 GFLOP/s"."""
    return _scaled(value, _DECIMAL) + unit


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2
    return f"{value:.{digits}f}"


def _scaled(value: float, units: _Units) -> str:
    factor, name = _unit(value, units)
    return f"{significant(value / factor)} {name}"


def _unit(value: float, units: _Units) -> tuple[float, str]:
    # Half a unit of the last digit below: 999.6 would print as 1000.
    return next((unit for unit in units if value >= 0.9995 * unit[0]), units[-1])
