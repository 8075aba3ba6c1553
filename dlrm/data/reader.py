"""Reads a prepared dataset as batches, in an order that is a pure function of the seed and of how far one has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.batch import Batch
from dlrm.data.dataset import Bags, Dataset, IntArray
from dlrm.data.read_ahead import BatchSize, Share, cut_batches, read_ahead


class Reader:
    """The endless stream of a split's samples: epoch after epoch, each sample once per epoch.

    Sample number p of the stream depends on (dataset, seed, p) alone. A run that resumes at p, even with another batch
    size, therefore goes on exactly where it stopped: no sample is lost and none is read twice. Shuffling permutes the
    parts of an epoch and the rows within each part, so that reads stay within one part's pages.

    Args:
        dataset: the prepared data.
        split: train, valid or test.
        shuffle: draw a new order for every epoch; otherwise the order of time.
        seed: of the shuffling.

    Raises:
        ValueError: the split has no rows.
    """

    def __init__(self, dataset: Dataset, split: str, *, shuffle: bool = False, seed: int = 0) -> None:
        self.dataset, self.split, self.shuffle, self.seed = dataset, split, shuffle, seed
        self.num_rows = dataset.rows(split)
        if not self.num_rows:
            raise ValueError(f"expected rows in the split '{split}' of {dataset.folder}, got none; check the source")
        self._part_rows = np.array([part.rows for part in dataset.info.splits[split]])
        self._first_rows = np.cumsum(self._part_rows) - self._part_rows
        largest = max(feature.num_rows for feature in dataset.info.features)
        self._id_dtype = np.dtype(np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
        self._part_order = lru_cache(maxsize=2)(self._draw_part_order)
        self._row_order = lru_cache(maxsize=4)(self._draw_row_order)

    def read(self, position: int, batch_size: int) -> Batch:
        """Return the batch of samples [position, position + batch_size) of the stream, cut at the end of the epoch."""
        epoch, start = divmod(position, self.num_rows)
        stop = min(start + batch_size, self.num_rows)
        order = self._part_order(epoch)
        ends = np.cumsum(self._part_rows[order])
        pieces = []
        for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            part = int(order[place])
            first = int(ends[place]) - int(self._part_rows[part])
            if first >= stop:
                break
            here = slice(max(start - first, 0), min(stop, int(ends[place])) - first)
            pieces.append((part, self._row_order(epoch, part)[here] if self.shuffle else here))
        return self._assemble(pieces or [(0, slice(0, 0))])

    def batches(
        self, batch_size: int | BatchSize, *, start: int = 0, stop: int | None = None, share: Share | None = None
    ) -> Iterator[Batch]:
        """Yield the batches of samples [start, stop), read ahead in a thread; without `stop`, for ever.

        Args:
            batch_size: samples per batch; the last one of an epoch may be smaller. A function is asked when a batch
                is cut, at most `AHEAD` batches before it comes out.
            start: number of the first sample in the stream.
            stop: number of the first sample that is not read.
            share: which samples of each batch to read, where others read the rest; there may be none in a batch.
        """

        def read(position: int, size: int) -> Batch:
            first, count = (0, size) if share is None else share(size)
            return replace(self.read(position + first, count), global_size=size, first=position)

        yield from read_ahead(read, cut_batches(self.num_rows, batch_size, start, stop))

    def _draw_part_order(self, epoch: int) -> IntArray:
        parts = len(self._part_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(parts) if self.shuffle else np.arange(parts)

    def _draw_row_order(self, epoch: int, part: int) -> IntArray:
        return np.random.default_rng([self.seed, epoch, part]).permutation(int(self._part_rows[part]))

    def _assemble(self, pieces: list[tuple[int, IntArray | slice]]) -> Batch:
        parts = [(self.dataset.part(self.split, part), where) for part, where in pieces]
        rows = [self._first_rows[part] + _numbers(where) for part, where in pieces]
        values, lengths = [], []
        for feature in self.dataset.info.features:
            for part, where in parts:
                ids = part.features[feature.name]
                if isinstance(ids, Bags):
                    bags, counts = _gather_bags(ids, where)
                    values.append(bags)
                    lengths.append(counts)
                else:
                    values.append(ids[where])
                    lengths.append(np.ones(len(values[-1]), dtype=np.int32))
        sparse = KeyedJaggedTensor(
            keys=[feature.name for feature in self.dataset.info.features],
            values=torch.from_numpy(np.concatenate(values, dtype=self._id_dtype)),
            lengths=torch.from_numpy(np.concatenate(lengths, dtype=np.int32)),
        )
        return Batch(
            dense=torch.from_numpy(np.concatenate([part.numeric[where] for part, where in parts])),
            sparse=sparse,
            labels=torch.from_numpy(np.concatenate([part.label[where] for part, where in parts], dtype=np.float32)),
            rows=torch.from_numpy(np.concatenate(rows)),
        )


def _numbers(where: IntArray | slice) -> IntArray:
    return np.arange(where.start, where.stop) if isinstance(where, slice) else where


def _gather_bags(bags: Bags, where: IntArray | slice) -> tuple[IntArray, IntArray]:
    """Return the ids of the bags at `where`, one after the other, and the number of ids of each."""
    if isinstance(where, slice):
        offsets = bags.offsets[where.start : where.stop + 1]
        return bags.values[offsets[0] : offsets[-1]], np.diff(offsets)
    firsts, counts = bags.offsets[where], bags.offsets[where + 1] - bags.offsets[where]
    ends = np.cumsum(counts)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(firsts - ends + counts, counts)
    return bags.values[places], counts
