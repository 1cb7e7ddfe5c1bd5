"""README's performance section is what the result files say, and nothing else of it changes."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

import bench_sample
from torchops.bench import results

TOOL = Path(__file__).parent.parent / "tools" / "readme_performance.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme_performance", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tool, tmp_path):
    """A README and a result file."""
    readme, result = tmp_path / "README.md", tmp_path / "zen4.json"
    readme.write_text(f"before\n{tool.BEGIN}\nold figures\n{tool.END}\nafter\n")
    results.save(bench_sample.resnet50(), result)
    return readme, result


def test_section(tool, files):
    readme, result = files
    assert tool.main([str(result), "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old figures" not in lines
    assert "### AMD EPYC 9B14" in lines
    assert "    torchops bench --suite resnet50 --threads 1" in lines
    pooling = next(line for line in lines if line.startswith("| pooling"))
    # Two pools: 5.00 and 1.00 forward, 1.00 and 2.00 backward.
    cells = [cell.strip() for cell in pooling.strip("|").split("|")]
    assert cells == ["pooling", "float32 contiguous, 1 thread", "2.24x", "1.41x", "1.00x", "0 of 4"]


def test_other_machines_than_the_newest_are_folded(tool, files, tmp_path):
    readme, old = files
    report = results.load(old)
    newer = replace(report, created=str(int(report.created[:4]) + 1) + report.created[4:])
    machine = replace(report.environment, cpu="Another")
    for name, environment in [("same", report.environment), ("other", machine)]:
        results.save(replace(report, environment=environment), tmp_path / f"{name}.json")
    results.save(newer, tmp_path / "a_newer.json")
    paths = [str(tmp_path / f"{name}.json") for name in ("other", "same", "a_newer")]
    assert tool.main([*paths, "--readme", str(readme)]) == 0
    shown, folded = readme.read_text().split("<details>")
    assert 0 < shown.index("[a_newer.json]") < shown.index("[same.json]")
    assert "[other.json]" in folded and "| pooling" in folded and "Another" not in shown
    assert folded.count("</details>") == 1


def test_the_newest_machine_of_a_day_is_shown(tool, files, tmp_path):
    readme, old = files
    report = results.load(old)
    day = report.created[:10]
    for name, hour, rows in [("early", "08", report.rows), ("late", "20", report.rows[:1])]:
        machine = replace(report.environment, cpu=name)
        made = replace(report, created=f"{day}T{hour}:00:00+00:00", environment=machine, rows=rows)
        results.save(made, tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in ("early", "late")]
    assert tool.main([*paths, "--readme", str(readme)]) == 0
    shown, folded = readme.read_text().split("<details>")
    assert "### late" in shown and "### early" not in shown and "### early" in folded


def test_whole_networks_of_the_newest_file(tool, tmp_path):
    environment = {"gpu": "", "cpu": "EPYC", "isa": "avx512", "torch": "2.13.0", "commit": "abc"}

    def row(run, speed, memory):
        speeds = {"train_speed": speed, "infer_speed": 2 * speed}
        return {"network": "lenet", "batch": 4, "run": run, "peak_memory": memory, **speeds}

    for day, speed in [(1, 9.0), (2, 1.25)]:
        rows = [row("torch.nn", 1.0, 2_000_000), row("torchops", speed, 1_000_000)]
        report = {"created": f"2026-01-0{day}T00:00:00+00:00", "command": f"made on day {day}"}
        report |= {"environment": environment, "rows": rows}
        (tmp_path / f"{day}.json").write_text(json.dumps(report))
    text = tool.networks([tmp_path / "2.json", tmp_path / "1.json"])
    assert "    made on day 2" in text and "day 1" not in text
    assert "| lenet | 4 | 1.25x | 2.50x | 2.00 MB → 1.00 MB |" in text
    assert tool.networks([]) == ""


def test_writing_twice_changes_nothing(tool, files):
    readme, result = files
    tool.main([str(result), "--readme", str(readme)])
    text = readme.read_text()
    assert tool.main([str(result), "--readme", str(readme), "--check"]) == 0
    tool.main([str(result), "--readme", str(readme)])
    assert readme.read_text() == text


def test_check_writes_nothing(tool, files, capsys):
    readme, result = files
    text = readme.read_text()
    assert tool.main([str(result), "--readme", str(readme), "--check"]) == 1
    assert readme.read_text() == text
    assert "is out of date" in capsys.readouterr().out


def test_errors(tool, files, capsys, tmp_path):
    readme, result = files
    readme.write_text("no markers")
    assert tool.main([str(result), "--readme", str(readme)]) == 2
    assert tool.BEGIN in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert tool.main([str(tmp_path / "bad.json"), "--readme", str(readme)]) == 2
    assert "schema is None" in capsys.readouterr().err
