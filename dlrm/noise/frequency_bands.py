"""Rows in bands by how often the training data name their ids: what is rare is never in too large a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dlrm.data.dataset import Dataset
from dlrm.planning.statistics import choose_pieces, read_ids
from embeddings.tables import TableConfig

# Of the samples that name an id; a few ten thousand samples tell these apart.
SHARES = (1 / 100, 1 / 10_000)
NAMES = ("in_1_of_100", "in_1_of_10000", "rarer")


class TableBands:
    """Which band each row of one table is in.

    Args:
        count: of bands; rows that are not listed are in the last one.
        listed: band by row.
    """

    def __init__(self, count: int, listed: Mapping[int, int]) -> None:
        rows = sorted(listed)
        self.count = count
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._bands = torch.tensor([listed[row] for row in rows], dtype=torch.int64)

    def sum(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Sum numbers [n] of rows [n] by band, in float64."""
        if self.count == 1:
            return numbers.sum(dtype=torch.float64).unsqueeze(0)
        if self._rows.device != rows.device:
            self._rows, self._bands = self._rows.to(rows.device), self._bands.to(rows.device)
        bands = torch.full_like(rows, self.count - 1)
        if len(self._rows):
            at = torch.searchsorted(self._rows, rows).clamp_(max=len(self._rows) - 1)
            bands = torch.where(self._rows[at] == rows, self._bands[at], bands)
        return torch.bincount(bands, weights=numbers.double(), minlength=self.count)


class FrequencyBands:
    """Bands of all tables' rows.

    Args:
        names: of the bands, the most frequent first; none puts all rows into one that has no name.
        listed: by table, the band of every row that is not in the last one.
    """

    def __init__(self, names: tuple[str, ...] = (), listed: Mapping[str, Mapping[int, int]] | None = None) -> None:
        self.names, self.count = names, max(1, len(names))
        self._tables = {name: TableBands(self.count, rows) for name, rows in (listed or {}).items()}
        self._others = TableBands(self.count, {})

    def of(self, table: str) -> TableBands:
        """Return those of a table."""
        return self._tables.get(table, self._others)


ONE_BAND = FrequencyBands()


def count_bands(dataset: Dataset, configs: Sequence[TableConfig]) -> FrequencyBands:
    """Look at some of the training samples, and list the rows that are not rare.

    Args:
        dataset: the prepared data.
        configs: the tables; their features are columns of the data.

    Raises:
        ValueError: there are no training samples.
    """
    listed: dict[str, dict[int, int]] = {}
    for config, rows, shares in _count_rows(dataset, configs):
        bands = np.searchsorted(-np.array(SHARES), -shares)
        known = bands < len(SHARES)
        listed[config.name] = dict(zip(rows[known].tolist(), bands[known].tolist(), strict=True))
    return FrequencyBands(NAMES, listed)


def measure_frequencies(dataset: Dataset, configs: Sequence[TableConfig]) -> dict[str, Tensor]:
    """Look at some of the training samples, and say how often rows occur per sample, by table.

    Returns:
        Sparse tensors [num_rows], as most rows of large tables are in none of these samples.
    """
    found: dict[str, Tensor] = {}
    for config, rows, shares in _count_rows(dataset, configs):
        listed = torch.from_numpy(rows.astype(np.int64))[None]
        found[config.name] = torch.sparse_coo_tensor(
            listed, torch.from_numpy(shares), (config.num_rows,), check_invariants=True
        )
    return found


def _count_rows(
    dataset: Dataset, configs: Sequence[TableConfig]
) -> Iterator[tuple[TableConfig, NDArray[Any], NDArray[np.float64]]]:
    """Yield each table with the rows that some of the training samples name, and how often per sample."""
    pieces = choose_pieces(dataset)
    samples = sum(where.stop for _, where in pieces)
    for config in configs:
        found = [read_ids(dataset, part, feature, where)[0] for feature in config.features for part, where in pieces]
        rows, counts = np.unique(np.concatenate(found), return_counts=True)
        yield config, rows, counts / samples
