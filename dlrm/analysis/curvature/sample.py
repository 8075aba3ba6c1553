"""A fixed sample of a dataset for analyses, and which rows of which table it touches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlrm.batch import Batch
from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader

SAMPLES_PER_PART = 4096  # whose activations lie in memory at a time
FEWEST_PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Bags:
    """One feature's ids in a part of the sample.

    Attributes:
        places: of every id among the touched rows of its table, [ids].
        bag_of: which sample every id belongs to, [ids].
        lengths: ids of every sample, [batch_size].
    """

    places: Tensor
    bag_of: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Bags:
        """Return the bags on `device`."""
        moved = [tensor.to(device) for tensor in (self.places, self.bag_of, self.lengths)]
        return Bags(places=moved[0], bag_of=moved[1], lengths=moved[2])


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
    batches = {split: _draw(Reader(dataset, split, shuffle=True, seed=seed), samples) for split in splits}
    every = [batch for drawn in batches.values() for batch in drawn]
    touched = {
        table: torch.unique(torch.cat([batch.sparse[name].values().long() for batch in every for name in features]))
        for table, features in tables.items()
    }
    table_of = {feature: table for table, features in tables.items() for feature in features}
    parts = {split: [(_part(batch, table_of, touched), len(batch)) for batch in b] for split, b in batches.items()}
    return Sample(parts=parts, touched=touched)


def _draw(reader: Reader, samples: int) -> list[Batch]:
    """Read pieces spread evenly over a shuffled epoch, as neighbours in it come from one part of the data."""
    samples = min(samples, reader.num_rows)
    count = min(samples, max(FEWEST_PARTS, math.ceil(samples / SAMPLES_PER_PART)))
    sizes = [samples * (i + 1) // count - samples * i // count for i in range(count)]
    return [reader.read(reader.num_rows * i // count, size) for i, size in enumerate(sizes)]


def _part(batch: Batch, table_of: Mapping[str, str], touched: Mapping[str, Tensor]) -> SamplePart:
    return SamplePart(
        numbers=batch.dense.double(),
        bags={feature: _bags(batch, feature, touched[table]) for feature, table in table_of.items()},
        labels=batch.labels.double(),
    )


def _bags(batch: Batch, feature: str, touched: Tensor) -> Bags:
    jagged = batch.sparse[feature]
    lengths = jagged.lengths().long()
    return Bags(
        places=torch.searchsorted(touched, jagged.values().long()),
        bag_of=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        lengths=lengths,
    )
