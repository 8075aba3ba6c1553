"""The report in a real browser: it loads from a file, draws what was logged, sorts and asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dlrm.analysis.report import write_report

pytestmark = pytest.mark.browser

CHARTS = {
    "loss",
    "auc",
    "normalized-entropy",
    "calibration-course",
    "dense-learning-rate",
    "tables-learning-rate",
    "calibration",
    "stages",
    "throughput",
    "waits",
    "segments",
}
# plotly hands over typed arrays here and there
READ_PLOTS = """
return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
  traces: plot.data.map((trace) => ({x: [...trace.x], y: [...trace.y]})),
  drawn: plot.querySelectorAll("svg.main-svg .trace, svg.main-svg .bars").length,
  text: [...plot.querySelectorAll("text")].map((text) => text.textContent),
}]));
"""


@pytest.fixture
def open_report(browser: Any) -> Callable[[Path], Any]:
    """A function that writes a run's report and opens it."""

    def show(folder: Path) -> Any:
        browser.get("about:blank")  # so that what the start page asks for is not in the log
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(write_report(folder).as_uri())
        return browser

    return show


def test_loads_from_a_file_without_errors_or_requests(open_report: Any, write_run: Any) -> None:
    browser = open_report(write_run())
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {browser.current_url}
    assert browser.current_url.startswith("file://")


def test_charts_show_what_was_logged(open_report: Any, write_run: Any) -> None:
    folder = write_run()
    browser = open_report(folder)
    plots = browser.execute_script(READ_PLOTS)
    assert set(plots) == CHARTS
    assert all(plot["drawn"] >= 1 for plot in plots.values())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train, valid = ([r for r in records if r["kind"] == kind] for kind in ("train", "valid"))
    summary = json.loads((folder / "summary.json").read_text())

    def points(chart: str, trace: int = 0) -> list[tuple[float, float]]:
        shown = plots[chart]["traces"][trace]
        return list(zip(shown["x"], shown["y"], strict=True))

    assert points("loss") == [(r["samples"], r["loss"]) for r in train]
    assert points("loss", 1) == [(r["samples"], r["logloss"]) for r in valid]
    assert points("auc") == [(r["samples"], r["auc"]) for r in valid]
    assert {y for _, y in points("auc", 1)} == {summary["bayes_auc"]}
    assert points("normalized-entropy") == [(r["samples"], r["normalized_entropy"]) for r in valid]
    assert points("calibration-course") == [(r["samples"], r["calibration"]) for r in valid]
    assert points("dense-learning-rate") == [(r["samples"], r["dense_learning_rate"]) for r in train]
    rates = [(r["samples"], pytest.approx(0.05 * r["tables_learning_rate_factor"])) for r in train]
    assert points("tables-learning-rate") == rates
    steps = zip([{"samples": 0, "seconds": 0.0}, *train], train, strict=False)
    speed = [pytest.approx((b["samples"] - a["samples"]) / (b["seconds"] - a["seconds"])) for a, b in steps]
    assert [y for _, y in points("throughput")] == speed
    curve = [(b["mean_prediction"], b["mean_label"]) for b in summary["calibration_curve"]]
    assert points("calibration", 1) == curve
    assert points("segments", 1) == [(s["auc"], f"{s['segment']} ({s['samples']:,} rows)") for s in summary["segments"]]
    assert points("stages")[0] == (pytest.approx(57.0 / 140.2), "dense backward")
    assert "40.7 %" in "".join(plots["stages"]["text"])
    assert {"0", "200k", "1M", "training samples"} <= set(plots["loss"]["text"])


def test_tables_sort_by_a_click_on_the_heading(open_report: Any, write_run: Any) -> None:
    browser = open_report(write_run())

    def click(heading: str) -> str | None:
        script = """
            const headings = [...document.querySelectorAll("thead th")];
            const heading = headings.find((th) => th.textContent.trim() === arguments[0]);
            heading.querySelector("button").click();
            return heading.getAttribute("aria-sort");"""
        direction: str | None = browser.execute_script(script, heading)
        return direction

    def shown(column: int) -> list[str]:
        script = "return [...document.querySelectorAll('tbody tr')].map((tr) => tr.cells[arguments[0]].dataset.value)"
        values: list[str] = browser.execute_script(script, column)
        return values

    assert shown(1) == ["2000000", "900", "31000", "12"]
    assert click("Rows") == "descending"
    assert shown(1) == ["2000000", "31000", "900", "12"]
    assert click("Rows") == "ascending"
    assert shown(1) == ["12", "900", "31000", "2000000"]
    assert click("Table") == "ascending"
    assert shown(0) == ["<script>alert(1)</script>", "app", "site", 'user\'s "id"']
    assert browser.execute_script("return document.querySelectorAll('th[aria-sort]').length") == 1
    total = browser.execute_script("return document.querySelector('tfoot').innerText").split()
    assert total[:3] == ["4", "tables", "2,031,912"]


def test_hostile_names_are_shown_and_not_run(open_report: Any, write_run: Any) -> None:
    folder = write_run()
    config = json.loads((folder / "config.json").read_text()) | {"recipe": "</title><script>window.hit = 1</script><b>"}
    (folder / "config.json").write_text(json.dumps(config))
    browser = open_report(folder)
    assert browser.execute_script("return window.hit") is None
    assert browser.find_element("tag name", "h1").text == config["recipe"]
    assert browser.title.startswith(config["recipe"])
    assert "<script>alert(1)</script>" in browser.find_element("css selector", "tbody").text


def test_unfinished_run_says_so(open_report: Any, write_run: Any) -> None:
    browser = open_report(write_run(finished=False))
    assert browser.get_log("browser") == []
    assert browser.find_element("class name", "badge").text == "not finished"
    assert set(browser.execute_script(READ_PLOTS)) == CHARTS - {"stages"}


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(open_report: Any, write_run: Any, width: int) -> None:
    browser = open_report(write_run())
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        widths = browser.execute_script(
            "return [...document.querySelectorAll('.main-svg')].map((svg) => svg.clientWidth)"
        )
        assert 0 < max(widths) < width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_either_scheme(open_report: Any, write_run: Any, scheme: str) -> None:
    browser = open_report(write_run(finished=False, name=scheme))
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        paper = _color(browser, "body", "backgroundColor")
        assert (sum(paper) < 3 * 128) == (scheme == "dark")
        for selector, style in (("body", "color"), (".legend", "color"), (".badge", "color"), ("summary", "color")):
            assert _contrast(_color(browser, selector, style), paper) >= 4.5, selector
        for selector in (".xtick text", ".ytick text", ".g-xtitle text"):
            assert _contrast(_color(browser, selector, "fill"), paper) >= 4.5, selector
        for selector in (".swatch", ".swatch.dashed"):
            assert _contrast(_color(browser, selector, "color"), paper) >= 3, selector
        assert _contrast(_color(browser, ".notice", "color"), _color(browser, ".notice", "backgroundColor")) >= 4.5
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_page_can_be_read_out(open_report: Any, write_run: Any) -> None:
    browser = open_report(write_run())
    assert browser.execute_script("return document.documentElement.lang") == "en"
    assert "synthetic" in browser.title
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    labels = browser.execute_script("return [...document.querySelectorAll('.plot')].map((p) => p.ariaLabel)")
    assert len(labels) == len(CHARTS)
    assert all(len(label) > 30 for label in labels)
    unnamed = "return [...document.querySelectorAll('section')].filter((s) => s.hasAttribute('aria-labelledby')"
    unnamed += " && !document.getElementById(s.getAttribute('aria-labelledby'))).length"
    assert browser.execute_script(unnamed) == 0


def test_paper_has_the_settings_too(open_report: Any, write_run: Any) -> None:
    browser = open_report(write_run())
    assert browser.execute_script("return document.querySelector('details').open") is False
    browser.execute_cdp_cmd("Page.printToPDF", {})
    assert browser.execute_script("return document.querySelector('details').open") is True


def _color(browser: Any, selector: str, style: str) -> list[int]:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    color: str = browser.execute_script(script, selector, style)
    return [int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]]


def _contrast(one: list[int], other: list[int]) -> float:
    """Return the contrast ratio of WCAG 2.2."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: list[int]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
