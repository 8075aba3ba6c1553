"""Every formula of the catalogue equals a closed form written down apart from it, wherever one comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dlrm.optim.decays import Cosine, LinearWarmup, MultiStep, PolyDecay, Step, WarmupRsqrtCooldown
from dlrm.optim.formulas import Constant, Formula, Piecewise
from dlrm.optim.schedule_text import FORMULAS, parse_formula
from dlrm.optim.stages import Stage, StageSchedule

# Written with an index of the step and tables of cases, as papers do, rather than as the formulas are.
CLOSED: list[tuple[str, Callable[[float], float]]] = [
    ("0.25", lambda s: 0.25),
    ("warmup(40)", lambda s: min(1, s / 40)),
    ("warmup(40, start=0.2)", lambda s: 0.2 + 0.8 * min(1, s / 40)),
    ("warmup(0)", lambda s: 1),
    ("constant_warmup(40, value=0.3)", lambda s: 0.3 if s < 40 else 1),
    ("poly(80)", lambda s: (1 - min(s, 80) / 80) ** 2),
    ("poly(80, start=20, power=3, end=0.1)", lambda s: 0.1 + 0.9 * ((100 - min(max(s, 20), 100)) / 80) ** 3),
    ("poly(80, start=20, floor=0.05)", lambda s: max(0.05, ((100 - min(max(s, 20), 100)) / 80) ** 2)),
    ("rsqrt(30)", lambda s: math.sqrt(30 / (30 + s))),
    ("rsqrt(30, warmup=20)", lambda s: s / 20 if s <= 20 else math.sqrt(30 / (s + 10))),
    (
        "rsqrt(30, warmup=20, until=200, cooldown=50)",
        lambda s: s / 20 if s <= 20 else math.sqrt(30 / (s + 10)) * (1 if s < 150 else max(0, 200 - s) / 50),
    ),
    ("rsqrt(30, warmup=20, shift=15)", lambda s: math.sqrt(30 / (30 + max(s, 20) - 20 + 15)) * min(1, s / 20)),
    ("step(25)", lambda s: 10 ** -(s // 25)),
    ("multistep((20, 70), gamma=0.5)", lambda s: 1 if s < 20 else 0.5 if s < 70 else 0.25),
    ("exp(20, gamma=0.5)", lambda s: 2 ** (-s / 20)),
    ("exp(20, gamma=3)", lambda s: 3 ** (s / 20)),
    ("inverse(20, power=0.75)", lambda s: (20 / (20 + s)) ** 0.75),
    ("sigmoid(60, width=9, end=0.2)", lambda s: 0.2 + 0.8 / (1 + math.exp((s - 60) / 9))),
    ("cosine(80)", lambda s: math.cos(math.pi * min(s, 80) / 160) ** 2),
    (
        "cosine(80, start=10, end=0.1)",
        lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * (min(max(s, 10), 90) - 10) / 80)) / 2,
    ),
    ("triangular(40)", lambda s: (s % 40) / 20 if s % 40 < 20 else 2 - (s % 40) / 20),
    ("triangular(40, low=0.1, high=0.7)", lambda s: 0.1 + 0.6 * (20 - abs(s % 40 - 20)) / 20),
    ("triangular(40, halve=True)", lambda s: (20 - abs(s % 40 - 20)) / 20 / 2 ** (s // 40)),
    ("triangular(40, gamma=0.8)", lambda s: (20 - abs(s % 40 - 20)) / 20 * 0.8 ** (s / 40)),
    ("sine(40, low=0.1)", lambda s: 0.1 + 0.9 * abs(math.sin(math.pi * s / 40))),
    ("sine(40, halve=True)", lambda s: abs(math.sin(math.pi * s / 40)) * 0.5 ** (s // 40)),
    ("sine(40, gamma=0.5)", lambda s: abs(math.sin(math.pi * s / 40)) * 0.5 ** (s / 40)),
    ("cosine_wave(40)", lambda s: math.cos(math.pi * s / 40) ** 2),
    ("cosine_wave(40, halve=True)", lambda s: math.cos(math.pi * s / 40) ** 2 * 0.5 ** (s // 40)),
    ("cosine_wave(40, gamma=0.5)", lambda s: math.cos(math.pi * s / 40) ** 2 * 0.5 ** (s / 40)),
    ("cosine_restarts(40)", lambda s: math.cos(math.pi * (s % 40) / 80) ** 2),
    (
        "cosine_restarts(10, growth=2)",  # periods [0, 10), [10, 30), [30, 70), [70, 150), [150, 310)
        lambda s: next(
            math.cos(math.pi * (s - begin) / (2 * (end - begin))) ** 2
            for begin, end in ((0, 10), (10, 30), (30, 70), (70, 150), (150, 310))
            if s < end
        ),
    ),
    ("sawtooth(40, low=0.5)", lambda s: 1 - 0.5 * (s % 40) / 40),
    ("sawtooth(40, halve=True)", lambda s: (1 - (s % 40) / 40) * 0.5 ** (s // 40)),
    ("piecewise((0, warmup(20)), (30, exp(10)))", lambda s: min(1, s / 20) if s < 30 else 0.1 ** ((s - 30) / 10)),
    (
        "stages((90, 64, 30, 0.8), (10, 32, 5, 0.4), (50, 16))",
        lambda s: (
            0.8 * min(1, s / 30) if s < 90 else 0.4 * min(1, (s - 90) / 5) if s < 100 else 1
        ),
    ),
    ("0.5 * warmup(40) * cosine(80)", lambda s: 0.5 * min(1, s / 40) * math.cos(math.pi * min(s, 80) / 160) ** 2),
]  # fmt: skip
SAMPLES = [0, 0.5, 5, 9.5, 10, 19, 20, 25, 29, 30, 35, 39.5, 40, 55, 69.5, 70, 80, 90, 97, 100, 149, 150, 175, 200, 300]
NEVER_JUMPS = [
    "warmup(40, start=0.2)", "poly(80, start=20, floor=0.05)", "rsqrt(30, warmup=20, until=200, cooldown=50, shift=15)",
    "exp(20)", "inverse(20)", "sigmoid(60, width=9)", "cosine(80)", "triangular(40, low=0.1, gamma=0.8)",
    "sine(40, halve=True)", "cosine_wave(40, gamma=0.9)",
]  # fmt: skip


@pytest.mark.parametrize(("text", "closed"), CLOSED, ids=[text for text, _ in CLOSED])
def test_formula_is_the_closed_form(text: str, closed: Callable[[float], float]) -> None:
    formula = parse_formula(text)
    assert [formula.factor(s) for s in SAMPLES] == pytest.approx([closed(s) for s in SAMPLES], rel=1e-9, abs=1e-9)


def test_the_table_leaves_no_formula_out() -> None:
    told = " ".join(text for text, _ in CLOSED)
    assert [kind.name for kind in FORMULAS if f"{kind.name}(" not in told] == ["constant"]  # the number alone


def test_going_back_finds_the_same_factors_and_two_formulas_do_not_meddle() -> None:
    first, second = MultiStep((20, 70), gamma=0.5), MultiStep((50,), gamma=0.1)
    forward = [(first.factor(s), second.factor(s)) for s in SAMPLES]
    backward = [(first.factor(s), second.factor(s)) for s in reversed(SAMPLES)]
    assert forward == backward[::-1]
    assert forward[-1] == pytest.approx((0.25, 0.1))
    with pytest.raises(FrozenInstanceError):
        first.gamma = 0.1  # type: ignore[misc]


@given(
    formula=st.sampled_from([parse_formula(text) for text, _ in CLOSED]),
    samples=st.floats(0, 1e12),
)
@example(formula=parse_formula("exp(20, gamma=3)"), samples=1e12)
def test_no_factor_is_negative_or_not_a_number(formula: Formula, samples: float) -> None:
    assert 0 <= formula.factor(samples) < math.inf


@given(text=st.sampled_from(NEVER_JUMPS), samples=st.floats(0, 400))
def test_a_small_step_changes_little(text: str, samples: float) -> None:
    formula = parse_formula(text)
    assert abs(formula.factor(samples + 1e-6) - formula.factor(samples)) < 1e-6


@given(
    formula=st.sampled_from([parse_formula(text) for text, _ in CLOSED]),
    samples=st.sampled_from([0.3, 7.7, 24.1, 41.3, 77.7, 99.1, 160.9]),
    factor=st.sampled_from([0.5, 3, 16]),
)
def test_stretched_it_has_the_same_shape_over_more_samples(formula: Formula, samples: float, factor: float) -> None:
    assert formula.stretch(factor).factor(samples * factor) == pytest.approx(formula.factor(samples), rel=1e-9)


def test_only_warmups_are_stretched_when_asked() -> None:
    formula = LinearWarmup(10) * Piecewise(((0, PolyDecay(80)), (50, WarmupRsqrtCooldown(30, warmup=5))))
    longer = LinearWarmup(40) * Piecewise(((0, PolyDecay(80)), (50, WarmupRsqrtCooldown(30, warmup=20))))
    assert formula.stretch(1, 4) == longer
    assert (formula.warmup_samples, longer.warmup_samples) == (10, 40)
    staged = StageSchedule((Stage(90, 64, 10), Stage(10, 32, 5)))
    assert staged.stretch(2, 4) == StageSchedule((Stage(180, 64, 80), Stage(20, 32, 20)))


def test_products_are_flat_and_take_numbers() -> None:
    a, b = LinearWarmup(10), Cosine(100)
    assert (2 * a) * (b * 0.5) == (Constant(2) * a) * (b * Constant(0.5))
    assert [type(part) for part in (a * b * (a * b)).parts] == [LinearWarmup, Cosine, LinearWarmup, Cosine]


def test_stages_say_their_batch_sizes() -> None:
    stages = StageSchedule(((900, 64, 50, 1.0), (100, 32, 10, 0.7)))
    assert stages.batch_sizes == (stages * LinearWarmup(5)).batch_sizes == ((0, 64), (900, 32))
    assert [stages.factor(s) for s in (0, 25, 50, 899, 900, 905, 910, 2000)] == pytest.approx(
        [0, 0.5, 1, 1, 0, 0.35, 0.7, 0.7]
    )


@given(at=st.floats(20, 1000), ratio=st.floats(1, 8), timescale=st.floats(10, 1000), later=st.floats(0, 5000))
def test_with_a_shift_the_rate_does_not_jump_where_the_batch_changes(
    at: float, ratio: float, timescale: float, later: float
) -> None:
    before = WarmupRsqrtCooldown(timescale, warmup=20)
    after = before.continued(at, ratio)
    assert ratio * after.factor(at) == pytest.approx(before.factor(at), rel=1e-9)
    assert ratio * after.factor(at + later) >= before.factor(at + later) * (1 - 1e-9)
    assert after.continued(at, 1.0).factor(at + later) == pytest.approx(after.factor(at + later), rel=1e-9)


def test_cooldowns_of_one_trunk_differ_only_when_they_cool() -> None:
    trunk = WarmupRsqrtCooldown(30, warmup=20)
    for until in (100, 200):
        branch = WarmupRsqrtCooldown(30, warmup=20, until=until, cooldown=40)
        assert [branch.factor(s) for s in range(until - 40)] == [trunk.factor(s) for s in range(until - 40)]
        cooling = [branch.factor(s) for s in range(until - 40, until + 1)]
        assert all(late < early for early, late in pairwise(cooling))
        assert branch.factor(until) == branch.factor(10**9) == 0


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Step(0), r"step\(samples\): expected a number of samples > 0, got 0"),
        (lambda: Cosine(float("nan")), r"cosine\(samples\): expected a number of samples > 0, got nan"),
        (lambda: Cosine(10, end=-1), r"cosine\(end\): expected a factor >= 0, got -1"),
        (lambda: LinearWarmup(True), r"warmup\(samples\): expected a number of samples >= 0, got True"),
        (lambda: MultiStep((5, 3)), r"multistep\(at\): expected rising samples, .*, got \(5, 3\)"),
        (lambda: WarmupRsqrtCooldown(10, until=5, cooldown=9), r"rsqrt\(cooldown\): expected until - warmup or less"),
        (lambda: WarmupRsqrtCooldown(10).continued(5, 0.5), r"rsqrt\(shift\): expected more than -timescale"),
        (lambda: StageSchedule((Stage(10, 4, 11),)), "a warm-up of 0 to samples"),
        (lambda: Piecewise(((0, StageSchedule((Stage(9, 4),))),)), r"piecewise\(pieces\): expected .* without stages"),
        (lambda: StageSchedule((Stage(9, 4),)) * StageSchedule((Stage(9, 5),)), "of one stages.* got several"),
        (lambda: Piecewise(((0, Constant(1)), (0, Constant(2)))), r"piecewise\(pieces\): expected first samples"),
    ],
)
def test_nonsense_names_its_argument(make: Callable[[], Formula], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()
