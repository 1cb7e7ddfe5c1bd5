"""The page in a real browser: it sorts, filters, draws, and complains about nothing.

A script at the end of the page does what a reader would do and leaves what it saw in the document,
which headless Chromium prints.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

import bench_sample
from bench_sample import report, row
from torchops.bench import page
from torchops.bench.parse import parse
from torchops.bench.results import Match

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=10000", "--enable-logging=stderr"),
]

WATCH = """<script>
const complaints = [];
addEventListener("error", event => complaints.push(event.message));
for (const level of ["error", "warn"]) console[level] = (...all) => complaints.push(all.join(" "));
</script>"""

READ = """
const cells = name => {
  const at = [...document.querySelectorAll("thead th")].findIndex(th => th.dataset.column === name);
  return [...document.querySelectorAll("tbody tr")].map(tr => tr.children[at].textContent);
};
const header = name => document.querySelector(`th[data-column="${name}"] button`);
const input = (id, value) => {
  $(id).value = value;
  for (const event of ["input", "change"]) $(id).dispatchEvent(new Event(event));
};
const points = () => document.querySelectorAll("#plot circle[data-point]").length;
"""


@pytest.fixture
def visit(tmp_path):
    """Opens the page of a report, runs a script in it, and gives what the script returns."""

    def open_page(measured, script, *flags):
        path = tmp_path / "page.html"
        text = page.render(measured).replace("<style>", WATCH + "<style>", 1)
        ask = f"const seen = (() => {{ {READ} {script} }})();"
        tell = 'element("pre", {id: "seen"}, JSON.stringify({seen, complaints}))'
        end = f"<script>{ask} document.body.replaceChildren({tell});</script></html>"
        path.write_text(text.replace("</html>", end))
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [CHROMIUM, *FLAGS, profile, *flags, "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
        )
        found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        outcome = json.loads(html.unescape(found[1]))
        assert outcome["complaints"] == []
        assert "CONSOLE" not in done.stderr
        return outcome["seen"]

    return open_page


def test_nothing_is_loaded_from_elsewhere():
    text = page.render(bench_sample.resnet50())
    addresses = set(re.findall(r"https?://[^\s\"'`]+", text))
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert not re.findall(r"<(?:script|img|iframe)[^>]* src=|@import|url\(", text)
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']


def test_text_cannot_end_the_script():
    text = page.render(report([row(parse("batch_norm:ic4"), error="</script><b>no")]))
    assert "</script><b>no" not in text
    assert text.count("</script>") == 1


@needs_chromium
def test_shows_every_row_and_point(visit):
    measured = bench_sample.resnet50()
    seen = visit(
        measured,
        """return {problems: cells("problem"), match: cells("match"), count: $("count").textContent,
        points: points(), bars: document.querySelectorAll(".bar").length,
        title: $("where").textContent};""",
    )
    count = len(measured.rows)
    assert seen["problems"] == [row.problem for row in measured.rows]
    assert set(seen["match"]) == {"✓"}
    assert seen["count"] == f"{count} of {count} rows"
    assert seen["points"] == count
    assert seen["bars"] == 2 * len({row.family for row in measured.rows})
    assert seen["title"] == "AMD EPYC 9B14, dtype float32, layout contiguous, threads 1"


@needs_chromium
def test_sorts(visit):
    measured = bench_sample.resnet50()
    seen = visit(
        measured,
        """header("ours [IQR]").click(); const up = cells("problem");
        const sort = header("ours [IQR]").parentElement.getAttribute("aria-sort");
        header("ours [IQR]").click(); const down = cells("problem");
        header("vs eager").click(); const ratios = cells("vs eager").map(parseFloat);
        header("problem").click(); const names = cells("problem");
        return {up, sort, down, ratios, names};""",
    )
    by_time = sorted(measured.rows, key=lambda row: row.times["ours"].median)
    assert seen["up"] == [row.problem for row in by_time]
    assert seen["sort"] == "ascending"
    by_time = sorted(measured.rows, key=lambda row: row.times["ours"].median, reverse=True)
    assert seen["down"] == [row.problem for row in by_time]
    assert seen["ratios"] == sorted(row.ratios["eager"].median for row in measured.rows)
    # 64 before 128: numbers in names count as numbers.
    assert seen["names"].index("batch_norm:mb8_ic64ih56_act=relu") < seen["names"].index(
        "batch_norm:mb8_ic128ih28_act=relu"
    )


@needs_chromium
def test_filters(visit):
    measured = bench_sample.resnet50()
    seen = visit(
        measured,
        """input("search", "batch_norm res"); const found = cells("problem"), drawn = points();
        const names = document.querySelectorAll(".bar > span:first-child");
        const bars = [...names].map(name => name.textContent);
        input("search", ""); input("direction", "bwd"); const bwd = cells("dir");
        input("direction", ""); $("lost").click(); const lost = cells("vs eager");
        input("search", "nothing like it");
        return {found, drawn, bars, bwd, lost, none: cells("problem").length,
                count: $("count").textContent, empty: $("bars").textContent};""",
    )
    expected = [row.problem for row in measured.rows if row.problem.endswith("_res")]
    assert seen["found"] == expected
    assert seen["drawn"] == len(expected)
    assert seen["bars"] == ["batch_norm+act fwd", "batch_norm+act bwd"]
    assert seen["bwd"] == ["bwd"] * (len(measured.rows) // 2)
    assert seen["lost"] == ["0.70x SLOWER"] * (len(measured.rows) // 7)
    assert (seen["none"], seen["count"]) == (0, f"0 of {len(measured.rows)} rows")
    assert seen["empty"] == "no rows"


@needs_chromium
def test_a_point_shows_its_row(visit):
    seen = visit(
        bench_sample.resnet50(),
        """const point = document.querySelector("#plot circle[data-point]");
        const name = point.dataset.point; point.dispatchEvent(new Event("click"));
        return {name, tip: $("tip").textContent,
                row: document.querySelector("tr.chosen td").textContent,
                marked: document.querySelectorAll("circle.chosen").length};""",
    )
    assert seen["row"] == seen["name"]
    assert seen["tip"].startswith(seen["name"])
    assert seen["marked"] == 1


@needs_chromium
def test_wrong_and_failed_rows_stand_out(visit):
    pool, norm = parse("max_pool2d:ic4ih8kh2"), parse("batch_norm:ic4ih8")
    rows = [
        row(pool, match=Match(False, 99.0, "output: error 1 is 99 ulps")),
        row(norm, error="RuntimeError: <b>no</b>"),
    ]
    script = 'return {match: cells("match"), ours: cells("ours [IQR]"), points: points()};'
    seen = visit(report(rows), script)
    assert seen["match"] == ["✗ output: error 1 is 99 ulps", "✗ RuntimeError: <b>no</b>"]
    assert seen["ours"][1] == "RuntimeError: <b>no</b>"
    assert seen["points"] == 1


@needs_chromium
def test_dark_and_light(visit):
    seen = visit(
        bench_sample.resnet50(),
        """const color = () => getComputedStyle(document.body).backgroundColor;
        const first = color(); $("theme").click(); return [first, color()];""",
    )
    assert set(seen) == {"rgb(251, 251, 250)", "rgb(20, 22, 26)"}


@needs_chromium
def test_a_phone_needs_no_sideways_scrolling(visit):
    seen = visit(
        bench_sample.resnet50(),
        """const beyond = cell => cell.getBoundingClientRect().right > innerWidth;
        return {inner: innerWidth, scroll: document.documentElement.scrollWidth,
                over: [...document.querySelectorAll("td")].filter(beyond).length};""",
        "--window-size=500,900",
    )
    assert seen["inner"] <= 500
    assert seen["scroll"] <= seen["inner"]
    assert seen["over"] == 0
