"""`torchops bench` as it is called: what it lists, runs, writes, refuses and returns."""

import importlib
import json

import pytest
import torch

import torchops
from bench_sample import ROOF, report, row
from torchops.bench import native, results, run, subject
from torchops.bench.cli import main
from torchops.bench.parse import parse
from torchops.bench.timing import Effort

POOL = "max_pool2d:mb2_ic4ih9kh3sh2ph1"
CONV = parse("conv2d:mb8_ic64ih56oc64kh3ph1")


@pytest.fixture
def fast(monkeypatch):
    """Three samples per row, and no minutes spent on the roofline."""
    effort = Effort(seconds=0.0, fewest=3, most=3, sample_seconds=0.0, warm_up_seconds=0.0)
    monkeypatch.setattr(run, "QUICK", effort)
    monkeypatch.setattr(run, "_ROTATION_LIMIT", {True: 1 << 16, False: 1 << 16})
    monkeypatch.setattr(
        run, "measure_rooflines", lambda device, dtypes: dict.fromkeys(dtypes, ROOF)
    )


def test_dry_run_lists_every_row_of_a_suite(capsys):
    assert main(["--suite", "lenet", "--batch", "2", "--threads", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{problem} float32 contiguous {direction} 1t lenet×1"
        for problem in (
            "conv2d:mb2_ic1ih28oc6kh5ph2_bias_first",
            "max_pool2d:mb2_ic6ih28kh2",
            "conv2d:mb2_ic6ih14oc16kh5_bias",
            "max_pool2d:mb2_ic16ih10kh2",
        )
        for direction in ("fwd", "bwd")
    ]


def listed(capsys, *arguments):
    assert main([*arguments, "--threads", "1", "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_dry_run_crosses_the_settings(capsys):
    lines = listed(capsys, POOL, "--dtype", "f32,bf16", "--layout", "contiguous,channels_last")
    assert [line.split()[1:4] for line in lines] == [
        [dtype, layout, direction]
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last")
        for direction in ("fwd", "bwd")
    ]


def test_an_operator_or_family_picks_its_rows(capsys):
    assert all(line.startswith("max_pool2d") for line in listed(capsys, "max_pool2d"))
    depthwise = listed(capsys, "depthwise", "--suite", "mobilenet_v2", "--direction", "fwd")
    assert len(depthwise) == 10
    assert all("_g" in line for line in depthwise)


def test_all_suites_share_their_rows(capsys):
    lines = listed(capsys, "--suite", "all", "--direction", "fwd")
    assert len({line.split()[0] for line in lines}) == len(lines) > 200
    assert any("resnet50×1 googlenet×1" in line for line in lines)


def test_evaluation_has_no_backward(capsys):
    lines = listed(capsys, "--suite", "bn_lenet", "--eval")
    assert lines
    assert all("eval" in line and " fwd " in line for line in lines)


def test_problem_strings_alone_bring_no_suite(capsys):
    assert len(listed(capsys, POOL)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv2d:ic3"], "conv2d needs ic, oc, ih, kh; missing: oc, ih, kh"),
        (["conv9d"], "unknown operator or family 'conv9d'; known: "),
        (["depthwise", "batch_norm", "--suite", "lenet"], "lenet has no depthwise or batch_norm"),
        (["--suite", "alexnet"], "--suite: suite 'alexnet' is unknown: lenet, "),
        (["--dtype", "int8"], "--dtype: unknown 'int8'; known: float32, "),
        (["--layout", "nhwc"], "--layout: unknown 'nhwc'; known: contiguous, channels_last"),
        (["--vs", "onednn"], "--vs: unknown 'onednn'; known: eager, compile"),
        (["--threads", "0"], "--threads: expected a number of at least 1, got '0'"),
        (["--device", "tpu"], "--device tpu: expected cpu, cuda or cuda:N"),
        (["conv1d:ic4iw9oc4kw3", "--layout", "channels_last"], "no problem has the layout"),
        (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--plot", "roof.docx"], "--plot roof.docx: expected an ending out of "),
    ],
)
def test_usage_errors(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_no_gpu(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_bad_numbers_end_like_argparse(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--batch", "0"])
    assert "expected a number of at least 1, got '0'" in capsys.readouterr().err


def test_a_run_writes_its_files(fast, capsys, tmp_path):
    files = [tmp_path / name for name in ("a.json", "a.html", "a.png")]
    options = [
        f"--{kind}={path}" for kind, path in zip(("json", "html", "plot"), files, strict=True)
    ]
    assert main([POOL, "--quick", "--threads", "1", "--dtype", "f32,bf16", *options]) == 0
    out, err = capsys.readouterr()
    assert "[4/4] max_pool2d:mb2_ic4ih9kh3sh2ph1 bfloat16" in err
    assert "max_pool2d:mb2_ic4ih9kh3sh2ph1" in out
    assert "✓" in out
    loaded = results.load(files[0])
    assert [(row.dtype, row.direction) for row in loaded.rows] == [
        ("float32", "fwd"),
        ("float32", "bwd"),
        ("bfloat16", "fwd"),
        ("bfloat16", "bwd"),
    ]
    assert all(row.times["ours"].samples == 3 for row in loaded.rows)
    assert loaded.environment.torch == torch.__version__
    assert loaded.command.startswith("torchops bench max_pool2d:")
    assert POOL in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_mismatch_is_exit_code_1(fast, capsys, monkeypatch):
    def wrong(*args):
        return native.max_pool2d(*args) + 1e-3

    monkeypatch.setattr(torchops.functional, "max_pool2d", wrong)
    assert main([POOL, "--quick", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert "✗" in out
    assert "output: error 0.001 is" in out


def test_a_failing_call_is_reported_and_the_rest_runs(fast, capsys, monkeypatch):
    def failing(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torchops.functional, "max_pool2d", failing)
    assert main([POOL, "max_pool1d:mb2_ic4iw9kw3", "--quick", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{POOL} float32 contiguous fwd 1t: RuntimeError: no kernel image" in out
    assert out.count("✓") == 2


def test_a_native_call_is_not_reported_as_our_own(fast, capsys, monkeypatch):
    def falls_back(*args):
        torchops._backend.warn_fallback("max_pool2d", "this test")
        return native.max_pool2d(*args)

    monkeypatch.setattr(torchops.functional, "max_pool2d", falls_back)
    assert main([POOL, "--quick", "--threads", "1"]) == 1
    assert "FallbackWarning: torchops.max_pool2d ran natively" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(fast, capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torchops.functional, "max_pool1d", interrupted)
    path = tmp_path / "a.json"
    arguments = [POOL, "max_pool1d:mb2_ic4iw9kw3", "--quick", "--threads", "1"]
    assert main([*arguments, "--json", str(path)]) == 1
    assert [row.problem for row in results.load(path).rows] == [POOL, POOL]
    assert "interrupted: 2 rows were not measured" in capsys.readouterr().err


def test_compile_is_a_peer(fast, capsys, monkeypatch):
    monkeypatch.setattr(subject, "_compiled", lambda peer: torch.compile(peer, backend="eager"))
    assert main([POOL, "--quick", "--threads", "1", "--vs", "eager,compile"]) == 0
    out = capsys.readouterr().out
    assert "vs compile" in out
    assert "times as fast as compile, by family" in out


def test_missing_rich_says_what_to_install(monkeypatch, capsys):
    def nowhere(name):
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(importlib, "import_module", nowhere)
    assert main([POOL, "--quick"]) == 2
    expected = "needs rich, which is not installed; install it with:  pip install 'torchops[bench]'"
    assert expected in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    def write(**ours):
        paths = []
        for name, units in ours.items():
            paths.append(tmp_path / f"{name}.json")
            results.save(report([row(CONV, ours=units)]), paths[-1])
        return [str(path) for path in paths]

    return write


def test_compare_passes_what_is_no_slower(files, capsys):
    assert main(["compare", *files(before=1.0, after=0.5)]) == 0
    out = capsys.readouterr().out
    assert "FASTER" in out
    assert "1 FASTER, 0 SAME, 0 SLOWER, 0 UNCERTAIN; mean speed by time 2.00x" in out
    assert "ratios to eager within 10 % of each other: 100% of the rows" in out


def test_compare_fails_on_a_regression(files, capsys):
    slower = files(before=1.0, after=1.2)
    assert main(["compare", *slower]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["compare", *slower, "--fail-below", "0.7"]) == 0
    assert main(["compare", *slower, "--by", "eager"]) == 0


def test_compare_errors(files, capsys, tmp_path):
    good, other = files(a=1.0, b=1.0)
    assert main(["compare", good, str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["compare", good, other, "--fail-below", "95"]) == 2
    assert "expected a speed in (0, 1], got 95.0" in capsys.readouterr().err
    assert main(["compare", good, other, "--by", "compile"]) == 2
    assert "share no row to compare" in capsys.readouterr().err


def test_json_of_a_run_is_plain_json(fast, tmp_path):
    path = tmp_path / "a.json"
    main([POOL, "--quick", "--threads", "1", "--direction", "fwd", "--json", str(path)])
    value = json.loads(path.read_text())
    assert value["rows"][0]["problem"] == POOL
    assert value["rows"][0]["match"]["ok"] is True
