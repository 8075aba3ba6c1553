"""Scaling rules: published numbers, the identities they stand for, and what a noisy quadratic says about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.optim.scaling_rules import (
    RuleName,
    ScaledGroup,
    ScalingRule,
    adascale_gain,
    mccandlish_rate,
    rows_are_rare,
    surge_rate,
)

DENSE = ScaledGroup(name="dense", optimizer="adam")
TABLES = ScaledGroup(name="tables", optimizer="adam")
GROUPS = [
    ScaledGroup(name=name, optimizer=optimizer, is_rare=rare)
    for name, optimizers in (("dense", ("lamb", "sgd", "adam")), ("tables", ("sgd", "rowwise_adagrad", "adam", "lamb")))
    for optimizer in optimizers
    for rare in ((None,) if name == "dense" else (None, True, False))
]
k = st.floats(1e-2, 1e3)


@pytest.mark.parametrize(
    ("rule", "rate"),
    [
        (ScalingRule(name="none"), lambda k: 1),
        (ScalingRule(name="linear"), lambda k: k),
        (ScalingRule(name="sqrt"), lambda k: k**0.5),
        (ScalingRule(name="power", power=0.75), lambda k: k**0.75),
        (ScalingRule(name="legw"), lambda k: k**0.5),
        (ScalingRule(name="adascale"), lambda k: 1),
    ],
    ids=lambda value: value.name if isinstance(value, ScalingRule) else "",
)
def test_simple_rules_are_powers_of_k_for_every_group(rule: ScalingRule, rate: Callable[[float], float]) -> None:
    for k in (0.25, 1, 3, 64):
        rates = [rule.multipliers(k, group).learning_rate for group in GROUPS]
        assert rates == pytest.approx([rate(k)] * len(GROUPS), rel=1e-12)


@pytest.mark.parametrize("name", get_args(RuleName))
def test_with_the_same_batch_nothing_changes_and_with_a_larger_one_no_rate_falls(name: RuleName) -> None:
    rule = ScalingRule(name=name)
    for group in GROUPS:
        m = rule.multipliers(1, group)
        assert (m.learning_rate, m.weight_decay, m.eps, m.forgetting, m.warmup) == (1, 1, 1, 1, 1)
        assert m.reason
        rates = [rule.multipliers(k, group).learning_rate for k in (1 / 64, 0.3, 1, 1.5, 7.9, 8.1, 16, 1000)]
        assert rates == sorted(rates)


def test_cowclip_gives_the_published_table() -> None:
    """Dense rate 8e-4 * sqrt(k), L2 1e-5 * k, rate of rows 1e-4 at every batch from 1K to 128K (LargeBatchCTR)."""
    rule = ScalingRule(name="cowclip")
    for k, rate, decay in (
        (1, 8e-4, 1e-5),
        (2, 0.0011313708498984762, 2e-5),
        (4, 1.6e-3, 4e-5),
        (8, 0.0022627416997969524, 8e-5),
        (16, 3.2e-3, 1.6e-4),
        (64, 6.4e-3, 6.4e-4),
        (128, 0.009050966799187809, 1.28e-3),
    ):
        dense, rows = rule.multipliers(k, DENSE), rule.multipliers(k, TABLES)
        assert 8e-4 * dense.learning_rate == pytest.approx(rate, rel=1e-12)
        assert 1e-5 * rows.weight_decay == pytest.approx(decay, rel=1e-12)
        assert (1e-4 * rows.learning_rate, dense.weight_decay) == (1e-4, 1)


@given(k=k)
def test_legw_keeps_the_number_of_warmup_steps(k: float) -> None:
    """Linear-epoch gradual warm-up: sqrt(k) for the rate, k for the epochs of warm-up (You et al. 2019)."""
    m = ScalingRule(name="legw").multipliers(k, DENSE)
    base_batch, base_warmup = 512, 51_200.0
    assert m.learning_rate**2 == pytest.approx(k)
    assert base_warmup * m.warmup / (base_batch * k) == pytest.approx(base_warmup / base_batch)


@given(k=st.floats(0.1, 50), m=st.floats(0.1, 2))
def test_sde_rules_compose_and_keep_the_time_of_moments(k: float, m: float) -> None:
    """Per sample, moments forget as fast as before, and lr ** 2 / batch size is the same."""
    rule = ScalingRule(name="sde")
    once, further, both = (rule.multipliers(ratio, DENSE) for ratio in (k, m, k * m))
    assert once.learning_rate * further.learning_rate == pytest.approx(both.learning_rate)
    assert once.eps * further.eps == pytest.approx(both.eps)
    assert once.forgetting / k == pytest.approx(1)
    assert once.learning_rate**2 / k == pytest.approx(1)
    assert once.eps * once.learning_rate == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "optimizer", "rare", "rate", "eps"),
    [
        ("dense", "adam", None, 4, 1),
        ("dense", "lamb", None, 4, 1),
        ("dense", "sgd", None, 8 * math.sqrt(2), 1),
        ("head", "adagrad", None, 1, 1),
        ("head", "factored", None, 4, 1),
        ("tables", "sgd", None, 16, 1),
        ("tables", "sgd", False, 8 * math.sqrt(2), 1),
        ("tables", "rowwise_adagrad", None, 1, 1 / 16),
        ("tables", "adam", True, 1, 1 / 16),
        ("tables", "adam", False, 4, 1 / 16),
        ("small_tables", "rowwise_adagrad", None, 1, 1 / 16),
        ("small_tables", "cowclip", None, 4, 1 / 16),
        ("small_tables", "cowclip", True, 1, 1 / 16),
    ],
)
def test_auto_tells_rare_rows_from_dense_weights(
    name: str, optimizer: str, rare: bool | None, rate: float, eps: float
) -> None:
    m = ScalingRule(name="auto").multipliers(16, ScaledGroup(name=name, optimizer=optimizer, is_rare=rare))
    assert (m.learning_rate, m.eps) == (pytest.approx(rate), pytest.approx(eps))


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_rare_rows_move_per_epoch_as_with_the_small_batch(optimizer: str) -> None:
    """A row of one sample per batch: its gradients are h / B; after the same samples it is where it was."""
    h = np.random.default_rng(0).normal(size=50)
    ends = []
    for batch_size in (64, 1024):
        m = ScalingRule(name="auto").multipliers(batch_size / 64, ScaledGroup(name="tables", optimizer=optimizer))
        weight, seen = 0.3, 0.0
        for gradient in h / batch_size:
            seen += gradient**2
            below = 1 if optimizer == "sgd" else math.sqrt(seen) + 0.01 * m.eps
            weight -= 0.5 * m.learning_rate * gradient / below
        ends.append(weight)
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)
    assert ends[0] != pytest.approx(0.3, rel=1e-3)


def test_adagrad_keeps_its_pace_per_epoch_where_noise_decides() -> None:
    """A weight with a small true gradient under much noise, under batches 16 times apart, for as many samples."""
    ends = []
    for batch_size in (4, 64):
        m = ScalingRule(name="auto").multipliers(batch_size / 4, ScaledGroup(name="dense", optimizer="adagrad"))
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(200, 2**15 // batch_size)) / math.sqrt(batch_size)  # of 200 such weights
        gradients = 0.01 + noise
        steps = 0.1 * m.learning_rate * gradients / np.sqrt(np.cumsum(gradients**2, axis=1))
        ends.append(float(steps.sum(axis=1).mean()))
    assert ends[0] == pytest.approx(ends[1], rel=0.15)
    assert ends[0] > 0.1


def test_a_table_is_rare_below_one_occurrence_per_batch() -> None:
    assert [rows_are_rare(1e-4, batch_size) for batch_size in (1_000, 9_999, 10_000, 65_536)] == [
        True,
        True,
        False,
        False,
    ]


@given(variance=st.floats(0, 1e6), norm=st.floats(0, 1e6), ratio=st.floats(1, 1e4))
def test_the_gain_lies_between_one_and_the_ratio(variance: float, norm: float, ratio: float) -> None:
    gain = adascale_gain(variance, norm, ratio)
    assert 1 - 1e-12 <= gain <= ratio * (1 + 1e-12)
    assert adascale_gain(variance, norm, ratio, adaptive=True) == pytest.approx(math.sqrt(gain))


def test_the_gain_at_its_ends_and_between() -> None:
    assert adascale_gain(3, 0, 16) == 16  # nothing but noise: as linear scaling
    assert adascale_gain(0, 3, 16) == 1  # no noise: the larger batch gives nothing
    assert adascale_gain(0, 0, 16) == 1
    assert adascale_gain(2, -1, 16) == 16  # an unbiased estimate below 0
    assert adascale_gain(30, 2, 16) == pytest.approx(32 / (30 / 16 + 2))


def test_laws_of_the_best_rate() -> None:
    sgd = [mccandlish_rate(b, noise_scale=1000, full_rate=0.8) for b in (1, 1000, 10**9)]
    assert sgd == pytest.approx([0.8 / 1001, 0.4, 0.8], rel=1e-5)
    adam = [surge_rate(b, peak_batch_size=1000, peak_rate=0.8) for b in (10, 20, 500, 1000, 2000, 10**5)]
    assert max(adam) == adam[3] == 0.8
    assert adam[2] == pytest.approx(adam[4])  # the same on both sides of the peak
    assert adam[1] / adam[0] == pytest.approx(math.sqrt(2), rel=0.02)
    assert adam[0] == pytest.approx(adam[5])


def test_a_ratio_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a ratio of batch sizes above 0, got 0"):
        ScalingRule(name="sqrt").multipliers(0, DENSE)


DIM, CHAINS, STEPS = 64, 8, 240
SIZES = (1, 2, 4, 8)  # far below DIM, so that noise and not curvature decides what is stable


def _excess(optimizer: str, rate: float, batch_size: int) -> float:
    """Fit y = noise of variance 1 by a linear model of normal inputs; return the mean excess loss it settles at.

    The loss is quadratic with curvature 1 everywhere, and that of a batch has curvatures up to about DIM / batch size.
    """
    rng = np.random.default_rng(0)
    weights, squares = np.zeros((CHAINS, DIM)), np.full((CHAINS, DIM), 1 / batch_size)
    excess = []
    for _ in range(STEPS):
        inputs = rng.normal(size=(CHAINS, batch_size, DIM))
        errors = np.einsum("cbd,cd->cb", inputs, weights) - rng.normal(size=(CHAINS, batch_size))
        gradient = np.einsum("cbd,cb->cd", inputs, errors) / batch_size
        if optimizer == "rmsprop":
            squares = 0.99 * squares + 0.01 * gradient**2
            gradient = gradient / np.sqrt(squares)
        weights = weights - rate * gradient
        excess.append(float((weights**2).sum(1).mean()))
        if excess[-1] > 1e6:
            return math.inf
    return float(np.mean(excess[STEPS // 2 :]))


@pytest.mark.parametrize(("optimizer", "power"), [("sgd", 1.0), ("rmsprop", 0.5)])
def test_on_a_noisy_quadratic_the_largest_stable_rate_is_a_power_of_the_batch(optimizer: str, power: float) -> None:
    """Linear for SGD and a root for what divides by the gradient's size (Granziol et al. 2022, arXiv:2006.09092).

    A rate counts as stable while the excess loss it settles at is below that of the noise itself.
    """
    rates = []
    for batch_size in SIZES:
        low, high = 1e-3, 1.0
        while high / low > 1.1:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if _excess(optimizer, middle, batch_size) < 1 else (low, middle)
        rates.append(low)
    slope = float(np.polyfit(np.log(SIZES), np.log(rates), 1)[0])
    assert slope == pytest.approx(power, abs=0.15)
    name: RuleName = "linear" if power == 1 else "sqrt"
    scaled = ScalingRule(name=name).multipliers(SIZES[-1], DENSE).learning_rate
    assert rates[-1] / rates[0] == pytest.approx(scaled, rel=0.35)
