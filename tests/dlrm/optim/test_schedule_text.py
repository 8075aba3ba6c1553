"""Texts of formulas: there and back without loss, never run as a program, and every mistake named in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.optim.decays import Cosine, Exp, LinearWarmup, MultiStep, PolyDecay, WarmupRsqrtCooldown
from dlrm.optim.formulas import Constant, Formula, Piecewise
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.scaling_rules import RuleName
from dlrm.optim.schedule_text import FORMULAS, describe_arguments, parse_formula
from dlrm.optim.stages import Stage, StageSchedule
from dlrm.optim.waves import CosineRestarts, Triangular

lengths = st.floats(1e-3, 1e9) | st.integers(1, 10**9)
sizes = st.floats(0, 10)
simple: st.SearchStrategy[Formula] = st.one_of(
    st.builds(Constant, sizes),
    st.builds(LinearWarmup, lengths, start=sizes),
    st.builds(PolyDecay, lengths, start=lengths, power=st.floats(0.1, 5), end=sizes, floor=sizes),
    st.builds(MultiStep, st.lists(lengths, min_size=1, max_size=3).map(sorted).map(tuple), gamma=st.floats(0.01, 1)),
    st.builds(WarmupRsqrtCooldown, lengths, warmup=lengths, shift=st.floats(0, 1e9)),
    st.builds(Triangular, lengths, halve=st.booleans(), gamma=st.floats(0.01, 1)),
    st.builds(CosineRestarts, lengths, growth=st.floats(1, 3)),
)  # fmt: skip
formulas = st.recursive(
    simple,
    lambda inner: (
        st.builds(lambda a, b: a * b, inner, inner)
        | st.builds(lambda a, start, b: Piecewise(((0, a), (start, b))), inner, lengths, inner)
    ),
    max_leaves=5,
)
stages = st.builds(
    lambda length, size: StageSchedule((Stage(length, size, length / 2), Stage(length, 1))),
    lengths,
    st.integers(1, 10**6),
)


@given(formula=formulas | stages | st.builds(lambda a, b: a * b, formulas, stages))
def test_the_text_of_a_formula_is_read_as_that_formula(formula: Formula) -> None:
    assert parse_formula(str(formula)) == formula


def test_texts_are_what_one_would_write() -> None:
    written = LinearWarmup(50_000) * Cosine(1_450_000, end=0.1)
    assert str(written) == "warmup(50_000) * cosine(1_450_000, end=0.1)"
    assert parse_formula(" warmup( samples=5e4 )*cosine(1450000,end=.1) ") == written
    assert parse_formula("2 * exp(10) * 0.5") == 2 * Exp(10) * 0.5
    assert parse_formula("triangular(10, halve=true)") == parse_formula("triangular(10, halve=True)")
    assert parse_formula("multistep([1, 2])") == MultiStep((1, 2))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cosin(3)", "expected one of the formulas warmup, .*stages, got cosin, perhaps cosine"),
        ("cosine(3, ende=3)", r"expected cosine\(samples, start=0, end=0\), got ende=3"),
        ("cosine(3, 4)", r"expected cosine\(samples, start=0, end=0\), got cosine\(3, 4\)"),
        ("cosine(3, samples=4)", "got samples=4"),
        ("cosine()", r"got cosine\(\) without samples"),
        ("triangular(3, low=2)", r"triangular\(high\): expected at least low = 2, got 1"),
        ("warmup(", "'warmup\\(' .*never closed|'warmup\\(' .*EOF"),
        ("", "expected formulas as warmup"),
        ("warmup(1) + exp(3)", "got warmup"),
        ("warmup", "expected a number, a formula or a list of these, got warmup"),
        ("'5'", "expected a number"),
        ("cosine(**x)", r"got \*\*x"),
        ("cosine(*x)", r"got \*x"),
        ("cosine(10 ** 3)", r"got 10 \*\* 3"),
        ("piecewise((5, exp(3)))", r"piecewise\(pieces\): expected first samples that begin with 0"),
        ("1e999", "expected a number up to 1e"),
        ("1" + "0" * 400, "expected a number up to 1e"),
        ("2*" * 20_000 + "1", "nested too deeply|too many|too complex"),
        ("().__class__.__bases__[0]", "expected a number"),
        ("__import__('os').system('true')", "expected one of the formulas"),
        ("(lambda: warmup(3))()", "expected one of the formulas"),
    ],
)
def test_mistakes_are_told_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        parse_formula(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@given(text=st.text(alphabet="warmupcosine()*,=_0123456789.- [](){}'\"\\#\n", max_size=40))
def test_any_text_is_a_formula_or_an_error(text: str) -> None:
    try:
        formula = parse_formula(text)
    except ValueError:
        return
    assert formula.factor(3) >= 0


@pytest.mark.parametrize("kind", FORMULAS, ids=[kind.name for kind in FORMULAS])
def test_every_formula_says_how_it_is_called(kind: type[Formula]) -> None:
    assert describe_arguments(kind).startswith(f"{kind.name}(")


def test_the_page_on_schedules_tells_of_every_formula_and_rule() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "schedules.md").read_text(encoding="utf-8")
    assert [kind.name for kind in FORMULAS if f"`{kind.name}(" not in page] == []
    assert [rule for rule in get_args(RuleName) if f"| `{rule}` |" not in page] == []
    called = [describe_arguments(kind) for kind in FORMULAS if kind.name in ("warmup", "poly", "rsqrt", "sigmoid")]
    assert [call for call in called if f"`{call}`" not in page] == []


def test_the_flag_is_named_when_the_configuration_is_made() -> None:
    with pytest.raises(ValueError, match=r"--dense-schedule.shape / --tables-schedule.shape: expected one of .* cosin"):
        Schedule(shape="cosin(3)")
    for schedule in ("tables-schedule", "head-schedule"):
        with pytest.raises(ValueError, match=rf"^--{schedule}\.shape: cosine\(samples\): expected .* got 0"):
            parse(RunConfig, [f"--{schedule}.shape", "cosine(0)"], program="recforge train synthetic")


def test_a_shape_multiplies_the_trapezoid() -> None:
    schedule = Schedule(warmup_samples=100, decay_samples=200, shape="constant_warmup(200, value=0.5) * 0.8")
    assert [schedule.factor(s) for s in (0, 50, 100, 200, 250)] == pytest.approx([0, 0.2, 0.4, 0.4, 0.2])
    assert (schedule.warm_after, Schedule(warmup_samples=7).warm_after) == (200, 7)


def test_neither_the_catalogue_nor_the_configuration_needs_torch() -> None:
    program = "import sys, dlrm.config, dlrm.optim.schedule_text; print('torch' in sys.modules, 'tyro' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "False"]
