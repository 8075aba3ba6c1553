"""The negatives of a sampled softmax: items drawn for a batch, and the targets of its other samples.

Targets alone would never push down items that are no targets; items drawn from all of the catalogue beside them do
(Yang et al. 2020, "Mixed negative sampling"). A negative stands there once, however often it was drawn, so its score is
corrected by the probability that it stands there at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from contrastive.data.sequence_dataset import SequenceDataset
from dlrm.data.dataset import Array, IntArray
from dlrm.data.splits import TRAIN

_ALMOST_ONE = 1 - 1e-12  # of a share: the logarithm of what is left of it stays finite


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """Sampled softmax: scores are taken against some items instead of all."""

    count: int = 1024
    """Items drawn for a batch, the same for all of its samples; 0 leaves the batch's targets."""
    power: float = 0.0
    """Items are drawn in proportion to (occurrences in training + 1) ** power: 0 draws all alike, 1 by popularity."""
    in_batch: bool = True
    """Whether targets of the batch's other samples are negatives besides."""

    def __post_init__(self) -> None:
        if self.count < (least := 0 if self.in_batch else 1):
            raise ValueError(f"--sequence.negatives: expected at least {least}, got {self.count}")
        if not 0 <= self.power <= 2:
            raise ValueError(f"--sequence.negatives-power: expected 0 to 2, got {self.power}")


class NegativeSampler:
    """Draws the negatives of batches.

    Args:
        dataset: the sequences; only their training part is counted.
        config: how many and which.
        seed: of the draws.
    """

    def __init__(self, dataset: SequenceDataset, config: NegativesConfig, seed: int) -> None:
        self.config, self._dataset, self._seed = config, dataset, seed

    def draw(self, position: int) -> IntArray:
        """Return ids of items for the batch that begins with sample `position` of the stream, some of them twice."""
        # A stream of its own beside those of the order (keyed by epoch) and of augmentation.
        rng = np.random.Generator(np.random.Philox(key=[np.uint64(self._seed), np.uint64(position)]))
        if not self.config.power:
            return rng.integers(1, self._dataset.num_items + 1, self.config.count)
        numbers = np.sort(rng.random(self.config.count))  # neighbours are found in the same cache lines
        drawn: IntArray = np.searchsorted(self._bounds, numbers, side="right") + 1
        return drawn

    def log_expected(self, ids: IntArray, batch_size: int) -> Array:
        """Return the log of the probability that each id is a negative of a sample in a batch, as float32."""
        missed = self.config.count * np.log1p(-self._shares(ids))
        if self.config.in_batch:
            # a batch of one has no other samples, and its target is not asked for
            missed += max(batch_size - 1, 1) * np.log1p(-np.minimum(self._target_shares[ids], _ALMOST_ONE))
        logs: Array = np.log(-np.expm1(missed)).astype(np.float32)
        return logs

    def _shares(self, ids: IntArray) -> Array:
        """Return how likely each of the ids is to be drawn at a time."""
        if not self.config.power:
            return np.full(len(ids), min(1 / self._dataset.num_items, _ALMOST_ONE))
        bounds = self._bounds  # of all items, most of which are not asked for
        shares: Array = np.minimum(bounds[ids - 1] - np.where(ids > 1, bounds[ids - 2], 0.0), _ALMOST_ONE)
        return shares

    @cached_property
    def _bounds(self) -> Array:
        """[num_items], cumulated shares of items 1, 2, ..."""
        weights = (self._dataset.item_counts[1:] + 1.0) ** self.config.power
        bounds: Array = np.cumsum(weights) / weights.sum()
        bounds[-1] = 1.0
        return bounds

    @cached_property
    def _target_shares(self) -> Array:
        """[num_items + 1], how often each id is the target of a training sample."""
        rows = self._dataset.rows(TRAIN)
        targets = self._dataset.targets(TRAIN, np.arange(rows))
        shares: Array = np.bincount(targets, minlength=self._dataset.num_items + 1) / rows
        return shares
