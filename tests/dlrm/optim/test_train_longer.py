"""What a large batch loses is updates, as was published: a dense model gets it back from as many of them.

Hoffer et al. 2017, arXiv:1705.08741: weights leave their start by the logarithm of the number of updates as long as the
rate is high, and with as many updates the gap to the small batch closes. Shown for logistic regression, whose data are
so many that more epochs do not overfit; tables of rare rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from dlrm.config import RunConfig, StepConfig
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.scaling import scale_config

Floats = NDArray[np.float64]
SMALL = RunConfig(dense=DenseOptimizerConfig(name="sgd", learning_rate=0.3), step=StepConfig(global_batch_size=16))
LARGE = replace(SMALL, scale_from=16, step=StepConfig(global_batch_size=256))
HALF, DIM = 8192, 100


class Clicks(NamedTuple):
    x: Floats  # [samples, DIM]; columns fall as the root of their number: some are learnt much later than others
    y: Floats  # [samples] of 0 and 1, drawn from a logistic model of x


def draw_clicks(seed: int) -> Clicks:
    """Draw twice as many samples as are trained on."""
    random = np.random.default_rng(seed)
    scales = 1 / np.sqrt(np.arange(1, DIM + 1))
    truth = random.normal(size=DIM)
    x = random.normal(size=(2 * HALF, DIM)) * scales
    logits = 2 * x @ truth / np.linalg.norm(truth * scales)
    return Clicks(x, (random.random(2 * HALF) < 1 / (1 + np.exp(-logits))).astype(np.float64))


def train(clicks: Clicks, config: RunConfig) -> Iterator[Floats]:
    """Give the weights after every update, from zeros, on the first half of the samples."""
    random, weights = np.random.default_rng(0), np.zeros(DIM)
    for _ in range(round(config.epochs)):
        order = random.permutation(HALF)
        for batch in np.split(order, HALF // config.step.global_batch_size):
            x, y = clicks.x[batch], clicks.y[batch]
            errors = 1 / (1 + np.exp(-x @ weights)) - y
            weights = weights - config.dense.learning_rate * errors @ x / len(batch)
            yield weights


def measure(clicks: Clicks, weights: Floats) -> tuple[float, float]:
    """The logloss, and the share of pairs in the wrong order (1 - AUC), on the other half."""
    logits, y = clicks.x[HALF:] @ weights, clicks.y[HALF:]
    ranks, positives = np.argsort(np.argsort(logits)), y.sum()
    auc = (ranks[y == 1].mean() - (positives - 1) / 2) / (len(y) - positives)
    return float(np.mean(np.logaddexp(0, logits) - y * logits)), float(1 - auc)


@pytest.mark.parametrize("rule", ["none", "sqrt"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_many_updates_close_the_gap_of_a_batch_16_times_as_large(rule: str, seed: int) -> None:
    clicks, ends = draw_clicks(seed), {}
    configs = {match: scale_config(replace(LARGE, rule=rule, match=match))[0] for match in ("epochs", "updates")}
    for name, config in {"small": SMALL, **configs}.items():
        path = list(train(clicks, config))
        ends[name] = (len(path), *measure(clicks, path[-1]))
    assert [updates for updates, _, _ in ends.values()] == [512, 32, 512]
    for least, (small, few, as_many) in zip((0.03, 0.02), list(zip(*ends.values(), strict=True))[1:], strict=True):
        gap = few - small
        assert gap > least
        assert few - as_many > 0.8 * gap


def fit(ways: Floats, times: Floats, of: Callable[[Floats], Floats]) -> tuple[float, float]:
    """Fit a line to the ways over a function of the time; return its slope and R squared."""
    slope, start = np.polyfit(of(times), ways, 1)
    return float(slope), float(1 - np.var(ways - slope * of(times) - start) / np.var(ways))


def follow_ways(batch_size: int, rate: float) -> tuple[Floats, Floats]:
    """Return how far the weights are after some of 1,536 updates, and which: evenly on a log scale."""
    dense = replace(SMALL.dense, learning_rate=rate)
    config = replace(
        SMALL, dense=dense, step=StepConfig(global_batch_size=batch_size), epochs=batch_size * 1536 // HALF
    )
    ways = np.array([np.linalg.norm(weights) for weights in train(draw_clicks(0), config)])
    at = np.unique(np.geomspace(1, len(ways), 40).astype(int))
    return ways[at - 1], at.astype(np.float64)


def test_at_a_high_rate_the_weights_leave_by_the_logarithm_of_the_updates_whatever_the_batch() -> None:
    slopes = []
    for batch_size in (16, 256):
        ways, times = follow_ways(batch_size, rate=3.0)
        slope, r_squared = fit(ways, times, np.log)
        assert r_squared > 0.95
        assert r_squared > fit(ways, times, np.sqrt)[1] + 0.03 > fit(ways, times, np.positive)[1] + 0.03
        slopes.append(slope)
    assert slopes[0] == pytest.approx(slopes[1], rel=0.15)


def test_at_a_low_rate_they_leave_by_a_root() -> None:
    ways, times = follow_ways(16, rate=0.1)
    assert fit(ways, times, np.log)[1] < 0.85
    assert fit(ways, times, np.sqrt)[1] > 0.95
