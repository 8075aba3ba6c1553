"""The pages of studies hold the numbers that were measured, and say in words what follows from them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from dlrm.analysis.study.batch_size_page import describe_advice, describe_verdict, find_out, list_warnings
from dlrm.analysis.study.page import format_significant
from dlrm.analysis.study.steps_to_result import BatchResult
from dlrm.analysis.study.study_folder import StudyFolder
from dlrm.recipes import RECIPES

RUN = RECIPES["synthetic"].config


def read_charts(page: Path) -> dict[str, dict[str, list[Any]]]:
    """Return x and y of each trace, by chart and name."""
    found = re.findall(r'data-plot="([\w-]+)">(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        name: {trace["name"]: [_plain(trace["x"]), _plain(trace["y"])] for trace in json.loads(figure)["data"]}
        for name, figure in found
    }


def _plain(values: Any) -> Any:
    assert not isinstance(values, dict), "plotly has packed an array"
    return values


def read_rows(page: Path) -> list[list[str]]:
    """Return the text of each cell of each row of the first table's body."""
    body = page.read_text(encoding="utf-8").split("<tbody>")[1].split("</tbody>")[0]
    return [
        [
            " ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
        ]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", body, flags=re.DOTALL)
    ]


def test_a_batch_size_page_holds_what_was_measured(batch_size_study: Any) -> None:
    page, results, said = batch_size_study()
    assert said.splitlines()[-1] == str(page)
    found = find_out(results)
    assert found.fit is not None
    assert found.fit.critical_batch == pytest.approx(1000, rel=0.1)
    assert found.explained is not None
    assert found.explained > 0.99
    assert [result.batch_size for result in results if result.rejected] == [65_536]
    charts = read_charts(page)
    assert set(charts) == {"steps", "samples", "parameter-dense-learning-rate"}
    believed = [result for result in results if not result.rejected]
    assert charts["steps"]["measured"] == [[r.batch_size for r in believed], [r.steps for r in believed]]
    assert charts["samples"]["measured"][1] == [r.samples for r in believed]
    x, y = charts["steps"]["fitted"]
    assert y == pytest.approx([found.fit.steps(batch) for batch in x])
    assert charts["parameter-dense-learning-rate"]["best"][1] == [r.parameters["dense.learning_rate"] for r in believed]
    rows = read_rows(page)
    assert [row[0].split()[0] for row in rows] == [f"{result.batch_size:,}" for result in results]
    for row, result in zip(rows, results, strict=True):
        numbers = [f"{n:,.0f}" if n is not None else "-" for n in (result.steps, result.samples)]
        spread = "" if result.spread is None else f" ± {result.spread:,.0f}"
        assert [row[1], row[2]] == [numbers[0], numbers[1] + spread]
        assert row[5] == f"{result.reached} of {result.trials} {result.diverged} diverged"
    assert rows[0][3] == "perfect scaling"
    assert rows[1][3] == "diminishing returns"
    assert rows[-1][0] == "65,536 no trial came to the goal"
    assert sum(result.diverged for result in results) > 0
    text = page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;law&lt;/b&gt;" in text
    assert "Batch 65,536 has no part in the fit" in text
    assert f"Trials that diverged: {results[0].diverged} of {results[0].trials} at batch 64" in text
    assert re.search(r"The critical batch is about \S+ samples \(\S+ to \S+, leaving one size out\)", said)
    assert "<code>--step.global-batch-size</code> 1024" in text


def believed(batch_size: int, samples: float, rate: float) -> BatchResult:
    return BatchResult(
        batch_size=batch_size,
        samples=samples,
        spread=None,
        parameters={"dense.learning_rate": rate},
        edges={},
        extended=False,
        trials=4,
        reached=4,
        diverged=0,
        repeated=(),
        rejected="",
    )


def test_words_for_a_law_that_cannot_be_fitted() -> None:
    flat = find_out([believed(64, 1000, 0.1), believed(128, 990, 0.1), believed(256, 980, 0.1)])
    assert flat.fit is None
    assert "it lies beyond the batches that were measured" in describe_verdict(flat)
    assert "256 is the largest that still saved steps" in describe_verdict(flat)
    assert any("Even 256" in sentence for sentence in describe_advice(flat, RUN))
    nothing = find_out([])
    assert describe_verdict(nothing).startswith("No batch size came to the goal")
    assert describe_advice(nothing, RUN) == [
        "Lower --goal, raise --epochs or --trials, or give other ranges with --space."
    ]


def test_two_sizes_give_no_critical_batch_and_one_saves_no_steps(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path, kind="batch-size", settings={}, quiet=True)
    two = [believed(64, 1000, 0.1), believed(128, 1500, 0.1)]
    found = find_out(two)
    assert (found.fit, found.explained, found.span) == (None, None, None)
    assert describe_verdict(found) == (
        "No critical batch could be fitted (expected at least 3 batch sizes that are believed, got 2). Of the batches "
        "tried, 128 is the largest that still saved steps."
    )
    assert any("it goes through any two points" in warning for warning in list_warnings(two, found, study))
    assert not any("time counts" in sentence for sentence in describe_advice(found, RUN))
    one = find_out(two[:1])
    words = " ".join([describe_verdict(one), *describe_advice(one, RUN)])
    assert "saved steps" not in words
    assert "got 1)" in words
    assert "have at least 3 sizes in --batches" in words


@pytest.mark.parametrize(
    ("batches", "side", "kind"), [((64, 128, 256), "above", "larger"), ((2048, 4096, 8192), "below", "smaller")]
)
def test_a_critical_batch_that_was_not_measured_is_no_advice(
    batches: tuple[int, ...], side: str, kind: str, tmp_path: Path
) -> None:
    results = [believed(batch, 1e5 * (1 + batch / 1000), 0.01) for batch in batches]
    found = find_out(results)
    assert found.fit is not None
    assert found.fit.critical_batch == pytest.approx(1000)
    assert describe_verdict(found).startswith(f"The critical batch lies {side} what was measured")
    advice = " ".join(describe_advice(found, RUN))
    assert "time counts" not in advice
    assert "compute counts" not in advice
    assert f"add {kind} sizes to --batches" in advice
    study = StudyFolder(tmp_path, kind="batch-size", settings={}, quiet=True)
    assert any(f"lies {side} the measured batches" in warning for warning in list_warnings(results, found, study))


def test_how_rates_went_with_the_batch_is_said() -> None:
    results = [believed(2**k, 1e5 * (1 + 2**k / 1000), 0.01 * 2 ** (k / 2)) for k in range(5, 12)]
    advice = " ".join(describe_advice(find_out(results), RUN))
    assert "the best dense.learning_rate went with the batch to the power 0.50" in advice
    # The recipe's eps, which is not tuned, is that of 2,048 samples.
    assert f"--step.global-batch-size 1024 --tables.eps 0.02 --dense.learning-rate {0.01 * 2**5:.3g}" in advice


def test_a_learning_rate_page_ranks_the_planted_policy_first(learning_rate_study: Any) -> None:
    page, said = learning_rate_study()
    assert said.startswith("Best is cosine: AUC 0.75")
    assert "ahead of all others by more than two standard errors" in said
    charts = read_charts(page)
    assert set(charts) == {"metric", "rates", "exploration", "paths"}
    assert set(charts["paths"]) == {"cosine", "poly", "range-test", "constant"}
    assert charts["metric"]["goal"][1] == [0.69, 0.69]
    assert charts["metric"]["cosine"][0][-1] == pytest.approx(200), "steps, not samples"
    rows = read_rows(page)
    assert [row[0].split()[0] for row in rows] == ["cosine", "poly", "range-test", "constant"]
    records = [json.loads(line) for line in (page.parent / "trials.jsonl").read_text().splitlines()]
    values = [record["best"] for record in records if record["trial"].startswith("cosine/seed-")]
    assert len(values) == 3
    assert rows[0][2].startswith(f"{sum(values) / 3:.4f} ±")
    assert [row[1] for row in rows] == ["1", "1", "2", "1"]
    assert "+ 500 explored" in rows[2][5]
    assert rows[0][7:] == ["0.0200", "0.800 ± 0.100"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0.0, "0"), (0.0012345, "0.00123"), (45.67, "45.7"), (1234567, "1,230,000"), (3e-7, "3.00e-07")],
)
def test_numbers_are_written_with_the_digits_that_count(number: float | None, text: str) -> None:
    assert format_significant(number) == text
