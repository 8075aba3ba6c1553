"""The sampled softmax is its formula, and over all draws the mean of its sum is the sum over all items."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import exp, log

import pytest
import torch
from torch import Tensor

from contrastive.losses.full_softmax import full_softmax
from contrastive.losses.sampled_softmax import sampled_softmax

CHANCES = (0.1, 0.4, 0.3, 0.2)
DRAWS = 3


def naive_loss(hidden: Tensor, rows: Tensor, targets: Tensor, log_q: Tensor) -> Tensor:
    terms = []
    for vector, target in zip(hidden, targets.tolist(), strict=True):
        right = torch.dot(vector, rows[target])
        total = torch.exp(right)
        for place, row in enumerate(rows):
            if place != target and log_q[place] > -torch.inf:
                total = total + torch.exp(torch.dot(vector, row)) / torch.exp(log_q[place])
        terms.append(torch.log(total) - right)
    return sum(terms) / len(terms)


@pytest.fixture
def sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of histories alone (0, 3), targets that were drawn too (2, 5) and one that was not (6)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([-torch.inf, -0.3, 0.2, -torch.inf, -1.5, 0.9, -torch.inf, 0.0], dtype=torch.float64)
    return hidden, rows, torch.tensor([2, 6, 5, 2, 6]), log_q


def test_value_and_gradients_are_those_of_the_formula(sample: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, log_q = sample
    expected = naive_loss(hidden, rows, targets, log_q)
    got = sampled_softmax(hidden, rows, targets, log_q)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, rows)), torch.autograd.grad(expected, (hidden, rows)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_rows_of_histories_alone_have_no_say(sample: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, log_q = sample
    (gradient,) = torch.autograd.grad(sampled_softmax(hidden, rows, targets, log_q), rows)
    assert (gradient.abs().sum(1) == 0).nonzero().flatten().tolist() == [0, 3]


def mean_over_all_draws(*, correct: bool, counted: bool) -> tuple[float, float]:
    """The mean of exp(loss), which is (sum over items) / exp(s_t), over every draw with its chance; and its goal."""
    generator = torch.Generator().manual_seed(5)
    hidden, rows = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in (1, len(CHANCES)))
    target = torch.tensor([1])
    mean = 0.0
    for draw in product(range(len(CHANCES)), repeat=DRAWS):
        chance, times = 1.0, Counter(draw)
        for item in draw:
            chance *= CHANCES[item]
        log_q = torch.full((len(CHANCES),), -torch.inf, dtype=torch.float64)
        for item, count in times.items():
            once = log(DRAWS * CHANCES[item] / count) if counted else log(1 - (1 - CHANCES[item]) ** DRAWS)
            log_q[item] = once if correct else 0.0
        mean += chance * exp(sampled_softmax(hidden, rows, target, log_q).item())
    return mean, exp(full_softmax(hidden, rows, target).item())


@pytest.mark.parametrize("counted", [True, False], ids=["expected_draws", "chance_to_be_drawn"])
def test_the_sum_is_unbiased(counted: bool) -> None:
    mean, goal = mean_over_all_draws(correct=True, counted=counted)
    assert mean == pytest.approx(goal, rel=1e-12)


def test_without_correction_the_sum_is_biased() -> None:
    mean, goal = mean_over_all_draws(correct=False, counted=True)
    assert abs(mean / goal - 1) > 0.05


def test_all_rows_as_negatives_are_the_full_softmax(sample: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, _ = sample
    got = sampled_softmax(hidden, rows, targets, torch.zeros(len(rows)))
    torch.testing.assert_close(got, full_softmax(hidden, rows, targets), rtol=1e-14, atol=0)


def test_what_cannot_be_sampled_is_told(sample: tuple[Tensor, ...]) -> None:
    hidden, rows, targets, log_q = sample
    with pytest.raises(ValueError, match="expected a log_q for each of 8 rows, got 3"):
        sampled_softmax(hidden, rows, targets, log_q[:3])
    with pytest.raises(ValueError, match="expected negatives among 8 rows, got none"):
        sampled_softmax(hidden, rows, targets, torch.full_like(log_q, -torch.inf))
