"""Where training ends and testing begins: cuts by order or by time, and rows sorted by time with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dlrm.data.dataset import Array, IntArray
from dlrm.data.schema import SplitConfig

TRAIN, VALID, TEST = SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive rows of a chunk: they are part number `part` of a split."""

    split: str
    part: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Rows [0, train) train, [train, valid) validate, [valid, rows) test."""

    train: int
    valid: int
    rows: int

    @property
    def row_ranges(self) -> dict[str, tuple[float, float]]:
        """The first and last row of each split that has rows."""
        bounds = {TRAIN: (0, self.train), VALID: (self.train, self.valid), TEST: (self.valid, self.rows)}
        return {split: (float(start), float(stop - 1)) for split, (start, stop) in bounds.items() if start < stop}

    def pieces(self, chunk_rows: Sequence[int]) -> list[tuple[Piece, ...]]:
        """Return what each chunk holds, for chunks of so many rows."""
        bounds = {TRAIN: (0, self.train), VALID: (self.train, self.valid), TEST: (self.valid, self.rows)}
        parts = dict.fromkeys(SPLITS, 0)
        pieces, first = [], 0
        for rows in chunk_rows:
            here = []
            for split, (start, stop) in bounds.items():
                start, stop = max(start, first) - first, min(stop, first + rows) - first
                if start < stop:
                    here.append(Piece(split=split, part=parts[split], start=start, stop=stop))
                    parts[split] += 1
            pieces.append(tuple(here))
            first += rows
        return pieces


def cut_by_order(rows: int, split: SplitConfig) -> Cuts:
    """Cut at shares of the rows.

    Raises:
        ValueError: a part would be empty.
    """
    valid = rows - round(rows * split.test)
    cuts = Cuts(train=valid - round(rows * split.valid), valid=valid, rows=rows)
    _check_parts(cuts, split)
    return cuts


def cut_by_time(times: ChunkTimes, split: SplitConfig) -> Cuts:
    """Cut as near the shares as rows of one time can stay together.

    Raises:
        ValueError: a part would be empty: there are too few distinct times.
    """
    rows = times.rows
    first = times.run_of(0)[1]  # the rows of the first time train, those of the second one may be the first to validate
    second = times.run_of(first)[1] if split.valid and first < rows else first
    valid = max(times.nearest_cut(rows - round(rows * split.test)), second) if split.test else rows
    train = valid
    if split.valid:
        train = min(max(times.nearest_cut(valid - round(rows * split.valid)), first), times.run_of(valid - 1)[0])
    cuts = Cuts(train=train, valid=valid, rows=rows)
    _check_parts(cuts, split)
    return cuts


def _check_parts(cuts: Cuts, split: SplitConfig) -> None:
    sizes = (cuts.train, cuts.valid - cuts.train, cuts.rows - cuts.valid)
    wanted = (True, split.valid > 0, split.test > 0)
    if any(want and size <= 0 for size, want in zip(sizes, wanted, strict=True)):
        raise ValueError(
            f"split: expected rows in every part, got train {sizes[0]}, valid {sizes[1]}, test {sizes[2]} of "
            f"{cuts.rows} rows (by {split.by}); change the shares valid={split.valid} and test={split.test}"
            + (", or split by order: rows of one time stay together" if split.by == "time" else "")
        )


class ChunkTimes:
    """The times of all rows, ascending within each chunk; answers questions on the order of the whole.

    The whole is ordered by (time, chunk, row), so that equal times keep the order of the source.

    Args:
        times: of all chunks, one after the other; may be memory-mapped.
        offsets: chunk i is times[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, times: Array, offsets: IntArray) -> None:
        self.rows = int(offsets[-1])
        self._chunks = [times[start:stop] for start, stop in pairwise(offsets)]

    @property
    def is_sorted(self) -> bool:
        """Whether every chunk ends before the next begins."""
        filled = [chunk for chunk in self._chunks if len(chunk)]
        return all(before[-1] <= after[0] for before, after in pairwise(filled))

    def count_before(self, times: Array, side: str) -> IntArray:
        """Return the number of rows below each time (`left`), or not above it (`right`)."""
        counts: IntArray = np.zeros(len(times), dtype=np.int64)
        for chunk in self._chunks:
            counts += np.searchsorted(chunk, times, side="left" if side == "left" else "right")
        return counts

    def times_at(self, ranks: IntArray) -> Array:
        """Return the times of the rows that stand at `ranks` in the order of the whole: bisection over all times."""
        dtype = self._chunks[0].dtype
        extremes = np.array([(chunk[0], chunk[-1]) for chunk in self._chunks if len(chunk)], dtype=dtype)
        low = np.full(len(ranks), _to_ordered(extremes[:, 0]).min())
        high = np.full(len(ranks), _to_ordered(extremes[:, 1]).max())
        while (low < high).any():
            middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
            enough = self.count_before(_from_ordered(middle, dtype), "right") > ranks
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return _from_ordered(low, dtype)

    def run_of(self, rank: int) -> tuple[int, int]:
        """Return the ranks [first, last + 1) of the rows that have the same time as the one at `rank`."""
        time = self.times_at(np.array([rank]))
        return int(self.count_before(time, "left")[0]), int(self.count_before(time, "right")[0])

    def nearest_cut(self, rank: int) -> int:
        """Return the rank nearest to `rank` between two different times."""
        if not 0 < rank < self.rows:
            return rank
        first, end = self.run_of(rank)
        if end == self.rows or (first and rank - first <= end - rank):
            return first
        return end

    def pieces(self, ranks: IntArray) -> Iterator[list[tuple[int, int, int]]]:
        """Yield the slices (chunk, start, stop) that make up the rows [ranks[i], ranks[i + 1]) of the whole."""
        times = self.times_at(np.minimum(ranks, self.rows - 1))
        before: IntArray = np.zeros(len(self._chunks), dtype=np.int64)
        for rank, time in zip(ranks[1:], times[1:], strict=True):
            after = self._positions(int(rank), time)
            moved = np.flatnonzero(after > before)
            yield [(int(chunk), int(before[chunk]), int(after[chunk])) for chunk in moved]
            before = after

    def _positions(self, rank: int, time: Array) -> IntArray:
        """Return how many rows of each chunk stand before `rank`, whose time is `time`."""
        if rank >= self.rows:
            return np.array([len(chunk) for chunk in self._chunks])
        below = np.array([np.searchsorted(chunk, time, side="left") for chunk in self._chunks])
        equal = np.array([np.searchsorted(chunk, time, side="right") for chunk in self._chunks]) - below
        before = np.cumsum(equal) - equal
        positions: IntArray = below + np.clip(rank - below.sum() - before, 0, equal)
        return positions


def _to_ordered(times: Array) -> IntArray:
    """Map times to int64 so that their order stays: of float64, the bits of negative numbers are flipped."""
    if times.dtype == np.int64:
        return times
    bits: IntArray = times.view(np.int64)
    return np.where(bits >= 0, bits, bits ^ np.iinfo(np.int64).max)


def _from_ordered(ordered: IntArray, dtype: np.dtype[np.generic]) -> Array:
    if dtype == np.int64:
        return ordered
    return np.where(ordered >= 0, ordered, ordered ^ np.iinfo(np.int64).max).view(np.float64)
