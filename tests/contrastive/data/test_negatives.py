"""Negatives come as often as they say that they do, which is what makes the correction of a sampled softmax right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from contrastive.data.negatives import NegativeSampler, NegativesConfig
from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.losses.full_softmax import full_softmax
from contrastive.losses.sampled_softmax import sampled_softmax

CONFIGS = [
    NegativesConfig(count=12),
    NegativesConfig(count=12, power=1.0),
    NegativesConfig(count=12, power=0.5, in_batch=False),
    NegativesConfig(count=0),
]
BATCH_SIZE = 10


def draw_negatives(dataset: SequenceDataset, sampler: NegativeSampler, position: int) -> set[int]:
    """The negatives of one sample, where the batch's other samples are drawn anew each time."""
    rng = np.random.default_rng([5, position])
    targets = dataset.targets("train", rng.integers(0, dataset.rows("train"), BATCH_SIZE - 1))
    drawn = set(sampler.draw(position).tolist())
    return drawn | (set(targets.tolist()) if sampler.config.in_batch else set())


@pytest.mark.parametrize("config", CONFIGS)
def test_negatives_come_as_often_as_they_say(dataset: SequenceDataset, config: NegativesConfig) -> None:
    batches, sampler = 2000, NegativeSampler(dataset, config, 3)
    found = Counter(item for position in range(batches) for item in draw_negatives(dataset, sampler, position))
    items = np.arange(1, dataset.num_items + 1)
    shares = np.exp(sampler.log_expected(items, BATCH_SIZE).astype(np.float64))
    counts = np.array([found[item] for item in items])
    deviations = np.sqrt(batches * shares * (1 - shares)) + 1
    assert (np.abs(counts - batches * shares) < 5 * deviations).all()
    assert 0.05 < shares.mean() < 0.5


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_the_sum_over_all_items_is_estimated_without_bias(dataset: SequenceDataset, config: NegativesConfig) -> None:
    torch.manual_seed(0)
    rows = torch.randn(dataset.num_items + 1, 4, dtype=torch.float64)
    rows[0] = -100  # PAD is never drawn
    hidden = torch.ones(1, 4, dtype=torch.float64) * 0.5
    sampler, target = NegativeSampler(dataset, config, 3), torch.tensor([7])
    sums = []
    for position in range(600):
        drawn = np.array(sorted(draw_negatives(dataset, sampler, position)))
        log_q = torch.full((len(rows),), -torch.inf)
        log_q[drawn] = torch.from_numpy(sampler.log_expected(drawn, BATCH_SIZE))
        sums.append(sampled_softmax(hidden, rows, target, log_q).exp().item())
    expected = full_softmax(hidden, rows, target).exp().item()
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - expected) < 4 * error
    assert error < 0.07 * expected


def test_one_stream_for_each_seed_and_position(dataset: SequenceDataset) -> None:
    first, second = (NegativeSampler(dataset, CONFIGS[0], seed) for seed in (1, 2))
    assert np.array_equal(first.draw(5), NegativeSampler(dataset, CONFIGS[0], 1).draw(5))
    assert not np.array_equal(first.draw(5), first.draw(6))
    assert not np.array_equal(first.draw(5), second.draw(5))
    assert set(np.concatenate([first.draw(position) for position in range(200)])) == set(
        range(1, dataset.num_items + 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0, "in_batch": False}, r"--sequence\.negatives: expected at least 1, got 0"),
        ({"count": -1}, r"--sequence\.negatives: expected at least 0, got -1"),
        ({"power": -1.0}, r"--sequence\.negatives-power: expected 0 to 2, got -1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NegativesConfig(**settings)
