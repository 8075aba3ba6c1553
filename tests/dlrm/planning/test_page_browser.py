"""The plan's page in a real browser: it loads from a file, shows what was planned and foreseen, and fits the screen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dlrm.data.dataset import Dataset

pytestmark = pytest.mark.browser

RunPlan = Callable[..., tuple[int, str, str]]
READ_PLOTS = """
return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
  traces: plot.data.map((trace) => ({name: trace.name, x: [...trace.x], y: [...trace.y]})),
  drawn: plot.querySelectorAll("svg.main-svg .trace, svg.main-svg .bars").length,
}]));
"""
READ_TABLE = """
const section = document.getElementById(arguments[0]).closest("section");
return [...section.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.innerText.trim()));
"""


@pytest.fixture
def open_plan(browser: Any, run_plan: RunPlan, tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """A function that plans into a page, opens it, and returns the browser and the text that was printed."""

    def show(*flags: str) -> tuple[Any, str]:
        page = tmp_path / "plan.html"
        status, text, notes = run_plan("--output", str(page), *flags)
        assert (status, notes.splitlines()[-1]) == (0, f"recforge: {page}")
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(page.as_uri())
        return browser, text

    return show


def test_it_shows_what_is_printed_and_asks_the_network_for_nothing(open_plan: Any, click_log: Dataset) -> None:
    browser, text = open_plan("--ranks", "8", "--memory", "80GB", "--simulate", "1,8,64")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {browser.current_url}
    plots = browser.execute_script(READ_PLOTS)
    assert set(plots) == {"holdings", "times", "scaling"}
    assert all(plot["drawn"] >= 1 for plot in plots.values())

    def cells(heading: str) -> list[list[str]]:
        part = next(part for part in text.split("\n\n") if part.startswith(heading))
        return [re.split(r"\s{2,}", line.strip()) for line in part.splitlines()[1:]]

    assert browser.execute_script(READ_TABLE, "time") == cells("stage ")[: len(cells("stage ")) - 2]
    assert browser.execute_script(READ_TABLE, "scaling") == cells("ranks ")[:3]
    assert browser.execute_script(READ_TABLE, "tables") == cells("table ")
    stacked = [sum(trace["y"][rank] for trace in plots["times"]["traces"]) for rank in range(8)]
    step = float(cells("stage ")[-2][1].split()[0])
    assert max(stacked) <= step * 1.001
    held = [sum(trace["y"][rank] for trace in plots["holdings"]["traces"]) for rank in range(8)]
    fullest = re.search(r"on average, (\S+) kB on rank (\d)", text)
    assert fullest is not None
    assert held[int(fullest[2])] == max(held) == pytest.approx(float(fullest[1]) * 1e3, rel=0.01)
    assert len(plots["holdings"]["traces"]) == 9
    assert plots["scaling"]["traces"][0]["x"] == [1, 8, 64]


def test_one_rank_without_a_simulation(open_plan: Any) -> None:
    browser, _ = open_plan("--ranks", "1")
    assert browser.get_log("browser") == []
    assert set(browser.execute_script(READ_PLOTS)) == {"holdings", "times"}
    assert browser.find_element("tag name", "h1").text == "synthetic on 1 rank"
    assert "measured" not in browser.execute_script("return [...document.querySelectorAll('h2')].map((h) => h.id)")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(open_plan: Any, width: int) -> None:
    browser, _ = open_plan("--ranks", "64", "--simulate", "8,64")
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        svgs = "return [...document.querySelectorAll('.main-svg')].map((svg) => svg.clientWidth)"
        assert 0 < max(browser.execute_script(svgs)) < width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_sorts_and_can_be_read_out(open_plan: Any, click_log: Dataset) -> None:
    browser, _ = open_plan("--ranks", "4")
    script = "document.querySelectorAll('table.sortable thead button')[1].click()"
    browser.execute_script(script)
    rows = [int(row[1].replace(",", "")) for row in browser.execute_script(READ_TABLE, "tables")]
    assert rows == sorted((feature.num_rows for feature in click_log.info.features), reverse=True)
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    labels = browser.execute_script("return [...document.querySelectorAll('.plot')].map((p) => p.ariaLabel)")
    assert all(len(label) > 30 for label in labels)
