"""Pages of studies in a real browser: they load from a file, draw what was measured, and fit the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

READ_PLOTS = """
return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
  drawn: plot.querySelectorAll("svg.main-svg .trace, svg.main-svg .bars").length,
  shapes: [...plot.querySelectorAll(".shapelayer path")].map((shape) => {
    const box = shape.getBoundingClientRect();
    return [box.left, box.right];
  }),
  area: (({left, right}) => [left, right])(plot.querySelector(".nsewdrag").getBoundingClientRect()),
  text: [...plot.querySelectorAll("text")].map((text) => text.textContent),
}]));
"""


@pytest.fixture
def open_page(browser: Any) -> Callable[[Path], Any]:
    """A function that opens a page."""

    def show(page: Path) -> Any:
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(page.as_uri())
        return browser

    return show


def check_it_stands_alone(browser: Any) -> None:
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {browser.current_url}


def test_a_batch_size_page_draws_its_law_and_regions(open_page: Any, batch_size_study: Any) -> None:
    page, _, _ = batch_size_study()
    browser = open_page(page)
    check_it_stands_alone(browser)
    plots = browser.execute_script(READ_PLOTS)
    assert set(plots) == {"steps", "samples", "parameter-dense-learning-rate"}
    assert all(plot["drawn"] >= 2 for plot in plots.values())
    steps = plots["steps"]
    assert {"perfect scaling", "diminishing returns", "maximal parallelism", "critical batch"} <= set(steps["text"])
    assert {"64", "256", "1,024", "4,096"} <= set(steps["text"])
    *areas, critical = steps["shapes"]
    assert len(areas) == 3
    assert areas[0][0] == pytest.approx(steps["area"][0], abs=2)
    assert areas[2][1] == pytest.approx(steps["area"][1], abs=2)
    assert areas[0][1] == pytest.approx(areas[1][0], abs=2)
    assert areas[1][1] == pytest.approx(areas[2][0], abs=2)
    # The regions end a decade to either side of the critical batch.
    assert sum(critical) / 2 == pytest.approx((areas[1][0] + areas[1][1]) / 2, abs=3)


def test_a_learning_rate_page_fits_a_phone(open_page: Any, learning_rate_study: Any) -> None:
    page, _ = learning_rate_study()
    browser = open_page(page)
    check_it_stands_alone(browser)
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.refresh()
        plots = browser.execute_script(READ_PLOTS)
        assert set(plots) == {"metric", "rates", "exploration", "paths"}
        assert all(plot["drawn"] >= 2 for plot in plots.values())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
