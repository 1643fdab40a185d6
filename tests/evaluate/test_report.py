"""The page: whole, safe, and readable in a browser from a phone's width on."""

import contextlib
import copy
import html.parser as html_parser
import io
import json
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from tests.evaluate.test_compare import run, write_run
from zoo import plots
from zoo.evaluate import documents, evaluated, html, svg
from zoo.evaluate.documents import Documents
from zoo.figures import Chart, Intervals, Line, Table
from zoo.mixers import MIXERS

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
NAME = '<script>alert("1")&'
VOID = {"meta"}

BINS = [{"first": 1, "last": 1, "tokens": 4, "loss": 3.0}, {"first": 2, "last": 2, "tokens": 4, "loss": 2.5}]
RECORD = {
    "workdir": "x", "step": 40, "mixer": "gla", "parameters": 1000, "device": "cpu (cpu)",
    "date": "2026-01-01T00:00:00", "versions": {"jax": "1"}, "batches": 0, "seconds": 1.0,
    "corpus": {
        "source": "stdlib", "fingerprint": "aaaa", "validation_tokens": 1000, "validation_bytes": 990, "lost_text": 0.0,
        "gzip_bits_per_byte": 1.9, "table_bits_per_byte": 2.8, "table_order": 3, "table_bytes": 100,
    },
    "tasks": {
        "perplexity": {"by_context_length": [
            {"context_length": 256, "loss": 2.0, "perplexity": 7.4, "accuracy": None, "bits_per_byte": 2.9,
             "tokens": 1000, "bytes": 990, "low": 2.8, "high": 3.0, "loss_by_position": BINS}]},
        "extrapolation": {"training_length": 256, "by_context_length": [
            {"context_length": n, "loss": 2 + n / 1000, "accuracy": None, "change": 0.1, "low": 0.0, "high": 0.2,
             "tokens": 9}
            for n in (256, 512, 1024)]},
        "recall": {"of": "passages", "passage": 32, "by_distance": [
            {"distance": n, "loss": 2.0, "without": 2.5, "gain": 0.5, "low": 0.4, "high": 0.6, "tokens": 9}
            for n in (64, 128)]},
        "decode": {"by_context_length": [
            {"context_length": n, "milliseconds": 0.5, "slowest": 0.6, "prefill_tokens_per_second": 1e4,
             "state_bytes": 4100} for n in (256, 1024)]},
        "needle": {"axis": "depth", "points": [
            {"context_length": 256, "value": d, "loss": 1.0, "accuracy": d, "tokens": 9} for d in (0.0, 0.5, 1.0)]},
        "of tomorrow": {"what": "ever"},
    },
}  # fmt: skip


class Page(html_parser.HTMLParser):
    """Tags that are closed in their order, and everything that could load something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [f"{k}={v}" for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data")]
        self.loads += [v for _, v in attributes if v and "url(" in v]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def evaluated_run(path, mixer="gla", factor=1.0, **changes):
    write_run(path, mixer)
    record = copy.deepcopy(RECORD) | {"mixer": mixer} | changes
    (path / "evaluate.json").write_text(json.dumps(record))
    nats = factor * np.random.default_rng(0).uniform(100, 200, 20)
    found = Documents(nats, np.full(20, 100.0), np.full(20, 99.0))
    arrays = documents.to_arrays(documents.Read(256), found)
    documents.write(path / "evaluate.npz", record["corpus"]["fingerprint"], arrays)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page, the records and the printed lines of three runs; one's name means something in HTML."""
    folder, printed = tmp_path_factory.mktemp("runs"), io.StringIO()
    evaluated_run(folder / "gla")
    evaluated_run(folder / "attention", "attention", 1.1)
    evaluated_run(folder / NAME, "retnet", 1.2)
    with contextlib.redirect_stdout(printed):
        records = run(folder, "gla", "attention", NAME)
    return (folder / "out" / "report.html").read_text(), records, printed.getvalue()


def test_the_page_is_whole_loads_nothing_and_runs_nothing(report):
    text, _, _ = report
    page = Page(text)
    assert page.open == [] and page.loads == [] and "script" not in page.tags
    assert not re.search(r"https?:|@import|//[a-z]", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    for expected in (
        "Differences",
        "perplexity",
        "extrapolation",
        "recall",
        "decode",
        "needle",
        "Training",
        "of tomorrow",
    ):
        assert expected in page.text
    assert NAME in page.text and page.tags.count("figure") >= 7


def test_differences_are_said_on_the_page_the_terminal_and_in_json(report):
    text, records, output = report
    found = records["attention"]["difference"]
    nats = np.random.default_rng(0).uniform(100, 200, 20).sum()
    assert found["difference"] == pytest.approx(0.1 * nats / np.log(2) / 1980, rel=1e-6)
    assert 0 < found["low"] < found["difference"] < found["high"] and found["best"] == "gla"
    assert found["unit"] == "bits per byte" and found["context_length"] == 256
    shown = f"{found['difference']:+.4f}"
    assert shown in Page(text).text and shown in output
    assert records["gla"]["difference"]["difference"] == 0


def test_runs_on_other_texts_or_without_documents_are_not_compared(tmp_path, capsys):
    evaluated_run(tmp_path / "a")
    evaluated_run(tmp_path / "b", corpus=RECORD["corpus"] | {"fingerprint": "bbbb"})
    evaluated_run(tmp_path / "c")
    (tmp_path / "c" / "evaluate.npz").unlink()
    evaluated_run(tmp_path / "d", corpus=RECORD["corpus"] | {"fingerprint": "bbbb"})
    shutil.copy(tmp_path / "a" / "evaluate.npz", tmp_path / "d" / "evaluate.npz")  # of another text
    records = run(tmp_path, "a", "b", "c", "d")
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert all(r["difference"] is None for r in records.values())
    assert "c: no losses by document" in text and "d: no losses by document" in text
    assert "perplexity on text aaaa" in text and "perplexity on text bbbb" in text


def test_what_one_run_alone_was_asked_says_which():
    alone = {"needle": RECORD["tasks"]["needle"]}
    found = [("a", RECORD | {"tasks": {}}), ("b", RECORD | {"tasks": alone})]
    sections = evaluated.sections([evaluated.Evaluated(name, "gla", record, {}) for name, record in found])
    assert [section.title for section in sections] == ["Runs", "Differences", "needle: b"]


def test_what_was_read_otherwise_is_not_compared():
    """At other lengths, of a task in other batches (whose rows are others), or of the text other parts."""
    nats = np.random.default_rng(0).uniform(100, 200, 20)
    whole = Documents(nats, np.full(20, 100.0), np.zeros(20))
    part = Documents(*(sums * (np.arange(20) < 10) for sums in whole))

    def found(*measured):
        runs = [evaluated.Evaluated(f"run {i}", "gla", RECORD, dict(each)) for i, each in enumerate(measured)]
        ranked, notes = evaluated.differences(runs)
        return [(d.run, d.context_length) for d in ranked], " ".join(notes)

    at = documents.Read
    assert found({at(64): whole}, {at(128): whole})[1].startswith(
        "The runs were evaluated at different context lengths"
    )
    assert found({at(64, 8): whole}, {at(64, 16): whole})[0] == []
    ranked, notes = found({at(64): whole}, {at(64): part})
    assert ranked == [] and "other parts of the text were read" in notes
    both = {at(64): whole, at(128): whole}
    assert found(both, {**both, at(256): whole})[0] == [("run 0", 128), ("run 1", 128)]


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": {"perplexity": {"by_context_length": [{"loss": "<b>"}]}}},
        {"tasks": {"decode": {"by_context_length": [{"context_length": 1, "milliseconds": 0}]}}},
        {"tasks": {"recall": {"of": "passages", "by_distance": [{"distance": "x"}]}}},
        {"tasks": {"needle": {"axis": "depth", "points": 3}}},
        {"tasks": {"mqar?pairs=<b>": {}}},
        {"tasks": [1]},
        {"corpus": "text"},
        {"parameters": [1]},
    ],
)
def test_an_odd_evaluation_is_one_line_of_error(tmp_path, capsys, change):
    evaluated_run(tmp_path / "run")
    (tmp_path / "run" / "evaluate.json").write_text(json.dumps(copy.deepcopy(RECORD) | change))
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "run")
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert "evaluate.json is not what zoo.evaluate writes" in error


def test_an_old_evaluation_is_said_to_be_old(tmp_path, capsys):
    evaluated_run(tmp_path / "run", step=20)
    run(tmp_path, "run")
    assert "run was evaluated at step 20, and has trained to 40" in capsys.readouterr().err


# --- Charts -----------------------------------------------------------------------------------------------------------


def test_no_two_of_24_runs_look_alike():
    mixers = {f"run {i}": mixer for i, mixer in enumerate([*MIXERS, *MIXERS][:24])}
    looks = html._looks(mixers)
    assert len({(look.colour, look.dash) for look in looks.values()}) == 24  # without their markers already
    assert len(html._DARK) == len(plots.COLOURS) and len(svg.MARKERS) == 8


def test_a_point_stands_where_its_axes_say():
    chart = Chart("t", "x", "y", [Line("a", [(256, 1.0), (1024, 2.0), (4096, None)], "a")], log_x=True)
    text = svg.draw(chart, [svg.Look(0, "", 0)])
    at = {tick: float(x) for x, tick in re.findall(r'<text x="([\d.]+)" y="202" text-anchor="middle">(\w+)<', text)}
    up = {tick: float(y) for y, tick in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text)}
    places = [tuple(map(float, p)) for p in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", text)]
    assert places == [(at["256"], pytest.approx(up["1"] - 3.5)), (at["1K"], pytest.approx(up["2"] - 3.5))]
    assert at["512"] == pytest.approx((at["256"] + at["1K"]) / 2, abs=0.1)
    assert (
        "a: 256, 1" in text
        and svg.draw(Chart("t", "x", "y", [Line("a", [(1, None)], "a")]), [svg.Look(0, "", 0)]) == ""
    )


@pytest.mark.parametrize("values", [(1, 1), (0.0371, 0.0372), (3, 2.5e7), (-1, 1), (1e-9, 1e9), (0, 0), (-1e30, 1e30)])
@pytest.mark.parametrize("base", [0, 2, 10])
def test_an_axis_has_ticks_within_it(values, base):
    axis = svg._Axis(values, 0, 100, base, most=6)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12 and len({text for _, text in ticks}) == len(ticks)
    assert all(-1e-6 <= axis.at(value) <= 100 + 1e-6 for value, _ in ticks)


def test_intervals_stand_on_one_scale():
    rows = [("a", 0.0, 0.0, 0.0), ("<b>" * 9, -1.0, 1.0, 3.0)]
    text = svg.intervals(Intervals("t", "x", rows), [svg.Look(0, "", 0), svg.Look(1, "", 1)])
    at = {tick: float(x) for x, tick in re.findall(r'<text x="([\d.]+)" y="56" text-anchor="middle">(-?\d)<', text)}
    assert re.findall(r'd="M([\d.]+) 33.5H([\d.]+)"', text) == [(f"{at['-1']:.1f}", f"{at['3']:.1f}")]
    assert [float(x) for x in re.findall(r"translate\(([\d.]+)", text)] == [at["0"], at["1"]]
    assert "<b>" not in text and "..." in text


def test_numbers_of_an_axis():
    shown = [svg.number(v) for v in (0.25, 3, 512, 1024, 65536, 1 << 20, 20_000, 1500, 2.5e6, 3e9, -20_000)]
    assert shown == ["0.25", "3", "512", "1K", "64K", "1M", "20k", "1500", "2.5M", "3G", "-20k"]


def test_png_and_page_draw_the_same_charts(tmp_path):
    lines = [Line(f"context {n}", [(1, 2.0), (2, None), (4, 1.5)], "run") for n in (256, 512)]
    charts = [Chart("a", "x", "y", lines, marked=(2, "here")), Chart("b", "x", "y", lines, log_x=False, log_y=True)]
    plots.charts(charts, {"run": "gla"}, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").std() > 0.05
    page = Page(html.page("t", [], {"run": "gla"}, [html.Section("s", charts, [Table("t", ["a"], [["1"]])])]))
    assert page.tags.count("figure") == 2 and page.tags.count("table") == 1


# --- In a browser -----------------------------------------------------------------------------------------------------


def browse(*arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    return subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_in_a_browser_fits_wide_and_narrow_light_and_dark(report, tmp_path):
    text, _, _ = report
    path, pictures = tmp_path / "page.html", {}
    path.write_text(text)
    for width, dark in ((360, True), (1600, False)):
        picture = tmp_path / f"{width}_{dark}.png"
        scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        browse(f"--window-size={width},1200", f"--screenshot={picture}", *scheme, f"file://{path}")
        pictures[width, dark] = matplotlib.image.imread(picture)[..., :3]
    for (_, dark), pixels in pictures.items():
        assert pixels.std() > 0.02 and (pixels.mean() < 0.3 if dark else pixels.mean() > 0.7)
    # What is wider than a phone would be scrolled to; a script says so, in a copy whose policy lets it.
    script = "document.title = 'W' + document.documentElement.scrollWidth + ' ' + window.innerWidth"
    path.write_text(re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", f"<script>{script}</script></body>"))
    done = browse("--window-size=360,1200", "--dump-dom", f"file://{path}")
    wide, window = map(int, re.search(r"W(\d+) (\d+)", done.stdout).groups())
    assert wide <= window
