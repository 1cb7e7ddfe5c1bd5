"""Numbers as people read them."""

import pytest
import torch

from torchops.bench import roofline, units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.50 s"),
        (0.0123, "12.3 ms"),
        (0.000999, "999 µs"),
        (0.0009997, "1.00 ms"),
        (4.56e-7, "456 ns"),
        (1e-12, "0.00 ns"),
    ],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (2048, "2.05 kB"), (12_845_056, "12.8 MB"), (5e12, "5.00 TB")],
)
def test_size(value, text):
    assert units.size(value) == text


def test_spread_keeps_one_unit():
    assert units.spread(0.00123, 0.000987, 0.0102) == "1.23 ms [0.99–10.2]"


def test_rate():
    assert units.rate(81.2e9, "FLOP/s") == "81.2 GFLOP/s"


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100")]
)
def test_significant(value, text):
    assert units.significant(value) == text


def test_no_16_bit_matmul_rate_is_under_float32s(monkeypatch):
    """A processor without such products converts; its bandwidth-bound rows are so still."""
    slow = {torch.bfloat16: 1.0, torch.float32: 50.0}
    monkeypatch.setattr(roofline, "_copy_rate", lambda *_: 10.0)
    monkeypatch.setattr(roofline, "_matmul_rate", lambda device, dtype, clock: slow[dtype])
    alone = roofline.measure_rooflines("cpu", [torch.bfloat16])
    assert alone == {torch.bfloat16: roofline.Roofline(10.0, 50.0)}
