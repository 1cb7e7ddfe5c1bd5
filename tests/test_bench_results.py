"""The result file: round trip, schema and its errors; totals; comparison of two files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import bench_sample
from bench_sample import around, report, row
from torchops.bench import compare, environment, results
from torchops.bench.parse import parse
from torchops.bench.report import environment_lines, line
from torchops.bench.results import SCHEMA, Match, ResultError
from torchops.bench.statistics import FASTER, SAME, SLOWER, UNCERTAIN
from torchops.bench.totals import totals

CONV = parse("conv2d:mb8_ic64ih56oc64kh3ph1")
NORM = parse("batch_norm:mb8_ic64ih56_act=relu")


def written(tmp_path, edit):
    """A sample file after `edit` of its JSON value."""
    path = tmp_path / "results.json"
    results.save(report([row(CONV)]), path)
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


def test_round_trip(tmp_path):
    before = bench_sample.resnet50()
    results.save(before, tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == before


def test_file_names_its_schema():
    assert json.loads(results.dumps(report([row(CONV)])))["schema"] == SCHEMA == "torchops.bench/1"


def set_in(*path):
    """An edit that puts the last of `path` at the place that the others name."""

    def edit(value):
        *place, name, new = path
        for key in place:
            value = value[key]
        value[name] = new

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_in("schema", "torchops.bench/0"), "schema is 'torchops.bench/0', this version reads"),
        (lambda value: value.pop("rows"), "report: 'rows' is missing"),
        (set_in("colour", "red"), "report: unknown field 'colour'"),
        (set_in("rows", {}), r"report.rows: expected list, got dict"),
        (set_in("rows", 0, "op", 3), r"report.rows\[0\].op: expected str, got int 3"),
        (set_in("rows", 0, "bytes", 1.5), r"report.rows\[0\].bytes: expected int, got float 1.5"),
        (set_in("rows", 0, "bytes", True), r"report.rows\[0\].bytes: expected int, got bool"),
        (
            set_in("rows", 0, "floor", -1.0),
            r"report.rows\[0\].floor: expected a number of at least",
        ),
        (
            set_in("rows", 0, "times", "ours", "median", "fast"),
            r"report.rows\[0\].times.ours.median: expected float, got str 'fast'",
        ),
        (
            set_in("rows", 0, "times", "ours", "median", math.nan),
            r"report.rows\[0\].times.ours.median: expected a number of at least 0, got nan",
        ),
        (set_in("environment", "cores", None), r"report.environment.cores: expected int"),
    ],
)
def test_errors_name_the_place(tmp_path, edit, message):
    with pytest.raises(ResultError, match=message) as error:
        results.load(written(tmp_path, edit))
    assert "results.json" in str(error.value)


def test_not_json(tmp_path):
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(ResultError, match=r"half.json is not JSON: Expecting value"):
        results.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ResultError, match="schema is None"):
        results.load(tmp_path / "list.json")
    with pytest.raises(ResultError, match=r"none.json: .*No such file"):
        results.load(tmp_path / "none.json")


def test_an_integer_is_a_number(tmp_path):
    path = written(tmp_path, set_in("rows", 0, "floor", 2))
    assert results.load(path).rows[0].floor == 2.0


def test_row():
    made = row(CONV, ours=4.0)
    assert made.fraction == pytest.approx(0.25)
    assert made.ok
    assert not row(CONV, match=Match(False, 99.0, "error 1 is 99 ulps")).ok
    assert not row(CONV, error="RuntimeError: no").ok


def test_lines():
    assert line(row(CONV)).endswith("fwd 1t: 23.1 ms, eager 2.00x FASTER")
    assert line(row(CONV, error="RuntimeError: no")).endswith("fwd 1t: RuntimeError: no")
    assert line(row(CONV, match=Match(False, 9.0, "wrong"))).endswith("2.00x FASTER, wrong")
    lines = "\n".join(environment_lines(report([row(CONV)])))
    for part in ("torchops bench --suite", "AMD EPYC", "2.13.0", "0123456789ab", "20.0 GB/s"):
        assert part in lines


def test_a_busy_machine_is_told():
    quiet, busy = report([row(CONV)]), replace(report([row(CONV)]), others=1.5)
    assert "other processes used 0.1 of 2 cores meanwhile" in environment_lines(quiet)
    assert "other processes used 1.5 of 2 cores meanwhile" in environment_lines(busy)
    threaded = replace(busy, rows=[replace(row(CONV), threads=2)])
    warning = ": do not trust rows of more than one thread"
    assert environment_lines(threaded)[-1].endswith(warning)


def test_own_work_is_not_the_others(monkeypatch):
    # In two seconds all processes computed for three, this one for two of them.
    readings = iter([(100.0, 50.0, 7.0), (102.0, 53.0, 9.0)])
    monkeypatch.setattr(environment, "_processor_seconds", lambda: next(readings))
    assert environment.Others().cores() == 0.5


def test_processor_time_is_read_where_there_is_proc():
    reading = environment._processor_seconds()
    assert reading is None if not Path("/proc/stat").exists() else min(reading) > 0


def test_totals_weigh_by_calls():
    rows = [
        row(CONV, calls={"a": 3, "b": 1}, ratio=2.0),
        row(parse("conv2d:mb8_ic64ih28oc64kh3ph1"), calls={"a": 1}, ratio=0.5),
        row(NORM, "bwd", calls={"a": 1}),
    ]
    found = {(total.suite, total.family, total.direction): total for total in totals(rows, "eager")}
    assert found.keys() == {
        ("a", "dense", "fwd"),
        ("b", "dense", "fwd"),
        ("a", "batch_norm+act", "bwd"),
    }
    dense = found["a", "dense", "fwd"]
    assert dense.ours == pytest.approx(3 * rows[0].floor + rows[1].floor)
    assert dense.peer == pytest.approx(6 * rows[0].floor + 0.5 * rows[1].floor)
    assert (dense.rows, dense.lost, dense.worst) == (2, 1, 0.5)
    assert dense.ratio == pytest.approx(1.0)
    assert found["b", "dense", "fwd"].ours == pytest.approx(rows[0].floor)


def changed(ours_before, ours_after, by="time", **after):
    found = compare.changes(
        report([row(CONV, ours=ours_before)]),
        report([row(CONV, ours=ours_after, **after)]),
        band=0.95,
        by=by,
    )
    return [change.verdict for change in found]


def test_compare_times():
    assert changed(1.0, 1.0) == [SAME]
    assert changed(1.0, 0.5) == [FASTER]
    assert changed(1.0, 1.5) == [SLOWER]


def test_compare_is_uncertain_where_spreads_are_wide():
    wide = row(CONV)
    wide.times["ours"] = around(wide.times["ours"].median * 1.2, spread=0.5)
    found = compare.changes(report([row(CONV)]), report([wide]), band=0.95)
    assert [change.verdict for change in found] == [UNCERTAIN]
    assert not compare.regressed(found)


def test_compare_by_ratio_ignores_a_slower_machine():
    assert changed(1.0, 1.5, by="eager") == [SAME]
    assert changed(1.0, 1.0, by="eager", ratio=1.0) == [SLOWER]
    assert changed(1.0, 1.0, by="eager", ratio=4.0) == [FASTER]


def test_compare_takes_only_rows_of_both():
    before = report([row(CONV), row(CONV, "bwd"), row(NORM, error="RuntimeError: no")])
    after = report([row(CONV), row(NORM)])
    assert [c.after.key for c in compare.changes(before, after, band=0.95)] == [row(CONV).key]


def test_repeatability():
    before = report([row(CONV, ratio=2.0), row(NORM, ratio=2.0)])
    after = report([row(CONV, ratio=2.1), row(NORM, ratio=2.5)])
    found = compare.changes(before, after, band=0.95)
    assert compare.repeatability(found, "eager") == 0.5
