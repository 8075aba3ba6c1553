"""The page of a study of curvature in a real browser: every chart is drawn, nothing is fetched, nothing complains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.curvature.page import write_curvature_page
from dlrm.analysis.curvature.trials import line_shares, name_probe, name_row, name_sharpness, spread

pytestmark = pytest.mark.browser

CONFIG = CurvatureConfig(run=Path("<b>small</b>"), second=Path("large"), probes=2, points=9, grid=5)
READ_PLOTS = """
return Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
  types: plot.data.map((trace) => trace.type), drawn: plot.querySelectorAll("svg.main-svg path").length,
  width: plot.querySelector("svg.main-svg").clientWidth,
}]));
"""


def around(number: int) -> dict[str, dict[str, Any]]:
    """What a study records around one solution; run 2 is sharper, and its loss overflows in a corner."""
    sharp = 10.0**number
    steps = spread(5, 1.0)
    records: dict[str, dict[str, Any]] = {
        f"{number}/extremes": {
            "smallest": -0.1,
            "smallest_error": 0.01,
            "largest": sharp,
            "largest_error": 1e-9,
            "products": 30,
            "num_weights": 500,
            "norm": 4.0,
            "loss": 0.4,
        },
        f"{number}/curve": {"losses": [0.4 + sharp * step**2 for step in spread(9, 1.0)]},
    }
    for probe in range(2):
        values, weights = [-0.1, 0.0, 0.5 + probe, sharp], [0.1, 0.8, 0.09, 0.01]
        records[name_probe(number, probe)] = {"values": values, "weights": weights}
    for size in CONFIG.sharpness:
        records[name_sharpness(number, size)] = {"percent": size * sharp, "highest": 0.41, "evaluations": 12}
    for row, down in enumerate(steps):
        losses: list[float | None] = [0.4 + sharp * (step**2 + down**2) for step in steps]
        records[name_row(number, row)] = {"losses": [None, *losses[1:]] if number == 2 and row == 0 else losses}
    return records


def test_every_chart_is_drawn(browser: Any, tmp_path: Path) -> None:
    records = around(1) | around(2)
    for split in ("train", "valid"):
        records[f"line/{split}"] = {"losses": [0.4 + math.sin(3 * share) ** 2 for share in line_shares(9)]}
    runs = [{"step": {"global_batch_size": size}} for size in (256, 4096)]
    page = write_curvature_page(tmp_path, CONFIG, runs, records)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    plots = browser.execute_script(READ_PLOTS)
    charts = {"density", "curve", "line", "landscape-run-1", "landscape-run-2"}
    assert set(plots) == charts
    assert all(plot["drawn"] > 1 and 200 < plot["width"] <= 1280 for plot in plots.values())
    assert "contour" in plots["landscape-run-2"]["types"]
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
    text = browser.execute_script("return document.body.innerText")
    for told in ("10 times as sharp", "Between them lies a barrier", "whose loss is not finite: 1", "<b>small</b>"):
        assert told in text
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
