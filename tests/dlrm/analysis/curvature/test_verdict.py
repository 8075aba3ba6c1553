"""What the page says in words follows from the numbers, and says when they mean little."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dlrm.analysis.curvature.findings import Finding, Line
from dlrm.analysis.curvature.trials import line_shares
from dlrm.analysis.curvature.verdict import advise, describe, list_warnings

SMALL = Finding(
    label="run 1",
    batch_size=256,
    loss=0.4,
    num_weights=100,
    norm=10.0,
    largest=(4.0, 0.0),
    smallest=(-0.1, 0.001),
    products=20,
    probes=[],
    trace=None,
    share_negative=None,
    sharpness={1e-3: 0.5},
    curve=[0.6, 0.4, 0.7],
    landscape=[],
)
LARGE = replace(SMALL, label="run 2", batch_size=4096, largest=(40.0, 0.1), sharpness={1e-3: 2.0})


def line(*between: float | None) -> Line:
    """A line with the losses 0.4 and 0.5 of two solutions, and others at equal distances between them."""
    shares = [-1.0, 0.0, *((i + 1) / (len(between) + 1) for i in range(len(between))), 1.0, 2.0]
    return Line(shares=shares, losses={"valid": [3.0, 0.4, *between, 0.5, 3.0]})


def test_the_sharper_of_two_is_named_with_its_batch() -> None:
    told = describe([SMALL, LARGE], None)
    assert told.startswith("Run 2 (batch 4,096) is 10 times as sharp as run 1 (batch 256)")
    assert "4 against 40" in told
    assert "and by the highest loss nearby (+2 % against +0.5 %)" in told
    assert "but not by the highest loss" in describe([SMALL, replace(LARGE, sharpness={1e-3: 0.1})], None)


@pytest.mark.parametrize("largest", [(4.8, 0.0), (40.0, 37.0)])
def test_differences_within_errors_are_none(largest: tuple[float, float]) -> None:
    assert describe([SMALL, replace(LARGE, largest=largest)], None).startswith("Both solutions are about as sharp")


def test_one_run_is_told_its_steepest_and_its_downward_direction() -> None:
    told = describe([SMALL], None)
    assert "curves by at most 4 in its steepest direction and by -0.1 in its most downward one" in told
    assert "no minimum" not in describe([replace(SMALL, smallest=(-0.1, 0.2))], None)
    assert "2 / 4 = 0.5" in advise([SMALL])[0]
    assert advise([replace(SMALL, largest=(-1.0, 0.0))]) == []


@pytest.mark.parametrize(
    ("between", "told"),
    [
        ((0.42, 0.45, 0.47), "no barrier"),
        ((0.42, 0.65, 0.47), "rises by up to 0.2 above the straight line, 50 % of the loss"),
        ((0.42, None, 0.47), "not finite on the way"),
    ],
)
def test_a_hill_between_two_solutions_is_a_barrier(between: tuple[float | None, ...], told: str) -> None:
    assert told in describe([SMALL, LARGE], line(*between))


def test_a_solution_without_a_finite_loss_has_no_line() -> None:
    broken = Line(shares=[0.0, 0.5, 1.0], losses={"valid": [None, 0.3, 0.4]})
    assert broken.barrier("valid") is None
    assert "no finite loss" in describe([SMALL, LARGE], broken)


@pytest.mark.parametrize("points", [1, 2, 25, 26])
def test_both_solutions_are_always_on_the_line(points: int) -> None:
    assert {0.0, 1.0} <= set(line_shares(points))


def test_warnings_say_what_the_numbers_depend_on() -> None:
    (scale,) = list_warnings([SMALL], None)
    assert "depend on how weights are scaled" in scale
    warnings = "\n".join(
        list_warnings(
            [SMALL, replace(LARGE, loss=0.6, norm=30.0, largest=(40.0, 3.0), curve=[None, 0.4, math.e])], None
        )
    )
    for told in (
        "losses on the sample differ, 0.4 and 0.6",
        "3 times as long",
        "more --steps",
        "not finite: 1;",
    ):
        assert told in warnings
