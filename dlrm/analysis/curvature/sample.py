"""A fixed sample of a dataset for analyses, and which rows of which table it touches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dlrm.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader

SAMPLES_PER_PART = 4096  # whose activations lie in memory at a time
FEWEST_PIECES = 8


@dataclass(frozen=True, kw_only=True)
class Bags:
    """One feature's ids in a part of the sample.

    Attributes:
        places: of every id among the touched rows of its table, [ids].
        lengths: ids of every sample, [batch_size].
    """

    places: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Bags:
        """Return the bags on `device`."""
        return Bags(places=self.places.to(device), lengths=self.lengths.to(device))

    @cached_property
    def has_one_each(self) -> bool:
        """Whether every sample has exactly one id."""
        return bool((self.lengths == 1).all())

    @cached_property
    def bag_of(self) -> Tensor:
        """Which sample every id belongs to, [ids]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)


@dataclass(frozen=True, kw_only=True)
class SamplePart:
    """Samples that are computed together: numbers [B, num_numeric], bags by feature, and labels [B]."""

    numbers: Tensor
    bags: Mapping[str, Bags]
    labels: Tensor

    def to(self, device: torch.device) -> SamplePart:
        """Return the part on `device`."""
        bags = {feature: ids.to(device) for feature, ids in self.bags.items()}
        return SamplePart(numbers=self.numbers.to(device), bags=bags, labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What analyses are made on.

    Attributes:
        parts: of every split that was asked for, with the number of samples of each.
        touched: by table, the ids that occur in any of them, ascending.
    """

    parts: Mapping[str, list[tuple[SamplePart, int]]]
    touched: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Sample:
        """Return the sample with its parts on `device`."""
        parts = {split: [(part.to(device), size) for part, size in its] for split, its in self.parts.items()}
        return Sample(parts=parts, touched=self.touched)


def draw_sample(
    dataset: Dataset, tables: Mapping[str, Sequence[str]], *, splits: Sequence[str], samples: int, seed: int
) -> Sample:
    """Draw samples at random from splits, in float64.

    Args:
        dataset: the prepared data.
        tables: the features of every table.
        splits: to draw from.
        samples: of every split; all of one that has no more.
        seed: of the draw.

    Raises:
        ValueError: a split has no rows.
    """
    pieces = {split: _draw(Reader(dataset, split, shuffle=True, seed=seed), samples) for split in splits}
    every = [batch for drawn in pieces.values() for batch in drawn]
    touched = {
        table: torch.unique(torch.cat([batch.sparse[name].values().long() for batch in every for name in features]))
        for table, features in tables.items()
    }
    table_of = {feature: table for table, features in tables.items() for feature in features}
    parts = {split: [_part(group, table_of, touched) for group in _group(drawn)] for split, drawn in pieces.items()}
    return Sample(
        parts={split: [(part, len(part.labels)) for part in p] for split, p in parts.items()}, touched=touched
    )


def _draw(reader: Reader, samples: int) -> list[Batch]:
    """Read pieces spread evenly over a shuffled epoch, as neighbours in it come from one part of the data."""
    samples = min(samples, reader.num_rows)
    count = min(samples, max(FEWEST_PIECES, math.ceil(samples / SAMPLES_PER_PART)))
    sizes = [samples * (i + 1) // count - samples * i // count for i in range(count)]
    return [reader.read(reader.num_rows * i // count, size) for i, size in enumerate(sizes)]


def _group(pieces: Sequence[Batch]) -> list[list[Batch]]:
    """Put pieces together until a part is full: few large ones take less time than many small ones."""
    per_part = max(1, SAMPLES_PER_PART // max(map(len, pieces)))
    return [list(pieces[first : first + per_part]) for first in range(0, len(pieces), per_part)]


def _part(pieces: Sequence[Batch], table_of: Mapping[str, str], touched: Mapping[str, Tensor]) -> SamplePart:
    return SamplePart(
        numbers=torch.cat([piece.dense for piece in pieces]).double(),
        bags={feature: _bags(pieces, feature, touched[table]) for feature, table in table_of.items()},
        labels=torch.cat([piece.labels for piece in pieces]).double(),
    )


def _bags(pieces: Sequence[Batch], feature: str, touched: Tensor) -> Bags:
    every = [piece.sparse[feature] for piece in pieces]
    return Bags(
        places=torch.searchsorted(touched, torch.cat([jagged.values() for jagged in every]).long()),
        lengths=torch.cat([jagged.lengths() for jagged in every]).long(),
    )
