"""What batches of a prepared dataset ask of its tables: ids per bag, empty bags, distinct rows, and where ids lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlrm.data.dataset import Bags, Dataset
from embeddings.tables import TableConfig
from embeddings.usage import TableUsage, Usage

SAMPLES = 1 << 17  # at most so many are looked at
PARTS = 8  # from so many places of the training split
TRAFFIC_STEPS = 4096
COUNTED_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)  # of the ids, in which distinct rows are counted

Ids = NDArray[Any]


def measure_usage(dataset: Dataset, configs: Sequence[TableConfig], global_batch_size: int) -> Usage:
    """Look at some of the training samples; the same dataset always gives the same figures.

    Args:
        dataset: the prepared data.
        configs: the tables; their features are columns of the data.
        global_batch_size: samples of a step.

    Raises:
        ValueError: there are no training samples.
    """
    pieces = choose_pieces(dataset)
    widest = max(config.num_rows for config in configs)
    return Usage(
        global_batch_size=global_batch_size,
        tables={config.name: _measure_table(dataset, config, pieces) for config in configs},
        id_bytes=4 if widest <= np.iinfo(np.int32).max else 8,
    )


def measure_top_shares(dataset: Dataset, configs: Sequence[TableConfig]) -> dict[str, float]:
    """Look at some of the training samples, and say how often the most frequent row of each table occurs per sample."""
    pieces = choose_pieces(dataset)
    samples = sum(where.stop for _, where in pieces)
    shares = {}
    for config in configs:
        found = [read_ids(dataset, part, name, where)[0] for name in config.features for part, where in pieces]
        _, counts = np.unique(np.concatenate(found), return_counts=True)
        shares[config.name] = float(counts.max(initial=0)) / samples
    return shares


def choose_pieces(dataset: Dataset) -> list[tuple[int, slice]]:
    """Return (part, rows) of training samples from the start to the end of the split."""
    rows = [part.rows for part in dataset.info.splits.get("train", ())]
    if not sum(rows):
        raise ValueError(f"expected rows in the split 'train' of {dataset.folder}, got none; check the source")
    parts = sorted({round(place) for place in np.linspace(0, len(rows) - 1, min(PARTS, len(rows)))})
    each = SAMPLES // len(parts)
    return [(part, slice(0, min(each, rows[part]))) for part in parts if rows[part]]


def _measure_table(dataset: Dataset, config: TableConfig, pieces: Sequence[tuple[int, slice]]) -> TableUsage:
    samples = sum(where.stop for _, where in pieces)
    found = [read_ids(dataset, part, name, where) for name in config.features for part, where in pieces]
    ids = np.concatenate([ids for ids, _ in found])
    bags = sum(filled for _, filled in found)
    steps = min(TRAFFIC_STEPS, config.num_rows)
    hits = np.bincount(ids.astype(np.int64) * steps // config.num_rows, minlength=steps)
    traffic = np.concatenate([[0.0], np.cumsum(hits) / max(len(ids), 1)])
    return TableUsage(
        ids_per_sample=len(ids) / samples,
        bags_per_sample=bags / samples,
        distinct=_count_distinct(ids),
        traffic=tuple(traffic.tolist()) if len(ids) else (),
    )


def read_ids(dataset: Dataset, part: int, feature: str, where: slice) -> tuple[Ids, int]:
    """Return the ids of a feature, and how many of its bags are not empty."""
    column = dataset.part("train", part).features[feature]
    if not isinstance(column, Bags):
        return column[where], where.stop - where.start
    offsets = column.offsets[where.start : where.stop + 1]
    return column.values[offsets[0] : offsets[-1]], int((np.diff(offsets) > 0).sum())


def _count_distinct(ids: Ids) -> tuple[tuple[float, float], ...]:
    """Count distinct rows among more and more ids, drawn from all places alike as shuffled batches are."""
    shuffled = np.random.default_rng(0).permutation(ids)
    counts = sorted({max(2, round(len(ids) * share)) for share in COUNTED_SHARES if len(ids) >= 2})
    return tuple((float(count), float(len(np.unique(shuffled[:count])))) for count in counts)
