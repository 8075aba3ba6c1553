"""Scores with their labels as sortable 64-bit keys in a file, so that an exact AUC needs no memory per row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

MAX_SEGMENT = 2**31 - 1
MAX_ROWS = 2**32  # beyond, twice the number of ordered pairs no longer fits an int64
CHUNK_ROWS = 1 << 17

_LABEL, _SCORE, _SEGMENT = np.uint64(1), np.uint64(1), np.uint64(33)  # mask of the first, shifts of the others


def pack_keys(scores: NDArray[Any], labels: NDArray[Any], segments: NDArray[Any] | None = None) -> Keys:
    """Pack rows into keys [rows] that sort by segment, then score, then label.

    A key is ``segment << 33 | score << 1 | label``. The score's 32 bits are those of the float32, made to sort as
    integers; -0.0 becomes 0.0.

    Args:
        scores: [rows], without NaN; rounded to float32.
        labels: [rows], 0 or 1.
        segments: [rows], in [0, MAX_SEGMENT]; 0 if not given.
    """
    bits = (scores.astype(np.float32) + np.float32(0.0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys: Keys = ordered.astype(np.uint64) << _SCORE | labels.astype(np.uint64)
    return keys if segments is None else keys | segments.astype(np.uint64) << _SEGMENT


@dataclass(frozen=True)
class TieGroups:
    """Rows of one segment and score each, in ascending order; all arrays [groups]."""

    segments: NDArray[np.int64]
    scores: NDArray[np.float64]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each group."""
        return self.positives + self.negatives

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The logistic function of the scores."""
        small = np.exp(-np.abs(self.scores))
        return np.where(self.scores >= 0, 1.0, small) / (1.0 + small)


def tie_groups(keys: Keys, chunk_rows: int = CHUNK_ROWS) -> Iterator[TieGroups]:
    """Go through sorted keys in chunks and yield whole groups, also those that lie across chunks."""
    names = np.empty(0, np.uint64)
    positives = negatives = np.empty(0, np.int64)
    for start in range(0, len(keys), chunk_rows):
        chunk = np.asarray(keys[start : start + chunk_rows])
        names_of_rows = chunk >> _SCORE
        first = np.flatnonzero(np.concatenate(([True], names_of_rows[1:] != names_of_rows[:-1])))
        ones = np.add.reduceat((chunk & _LABEL).astype(np.int64), first)
        zeros = np.diff(first, append=len(chunk)) - ones
        if len(names) and names[0] == names_of_rows[0]:
            ones[0] += positives[0]
            zeros[0] += negatives[0]
        elif len(names):
            yield _unpack(names, positives, negatives)
        # The last group may go on in the next chunk.
        names, positives, negatives = names_of_rows[first[-1:]], ones[-1:], zeros[-1:]
        if len(first) > 1:
            yield _unpack(names_of_rows[first[:-1]], ones[:-1], zeros[:-1])
    if len(names):
        yield _unpack(names, positives, negatives)


def _unpack(names: Keys, positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> TieGroups:
    """Take keys without their label apart again."""
    ordered = (names & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
    segments = (names >> (_SEGMENT - _SCORE)).astype(np.int64)
    return TieGroups(segments, bits.view(np.float32).astype(np.float64), positives, negatives)


class KeyFile:
    """Keys in a temporary file, which has no name and so is gone when this process is, however it ends.

    Args:
        directory: Where the file takes 8 bytes per key; the system's temporary directory if None.
    """

    PIECE_ROWS = CHUNK_ROWS

    def __init__(self, directory: Path | str | None = None) -> None:
        self._directory = Path(directory) if directory is not None else Path(tempfile.gettempdir())
        # Written rather than mapped: on a full disk a write raises, where a store into a mapping kills the process.
        self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (closed in `close`)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, keys: Keys) -> None:
        """Add keys at the end.

        Raises:
            ValueError: Beyond MAX_ROWS keys.
            OSError: If the disk is full.
        """
        if self._rows + len(keys) > MAX_ROWS:
            raise ValueError(f"expected at most {MAX_ROWS} rows in one evaluation, got {self._rows + len(keys)}")
        self._file.seek(8 * self._rows)
        rest = memoryview(keys.tobytes())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            what = f"cannot write row {self._rows} of the scores of an evaluation (8 bytes each) in {self._directory}"
            raise OSError(error.errno, f"{what}: {error.strerror}; free some space or set TMPDIR") from error
        self._rows += len(keys)

    def extend(self, other: KeyFile) -> None:
        """Add all keys of another file."""
        for keys in other.pieces():
            self.append(keys)

    def pieces(self) -> Iterator[Keys]:
        """Yield all keys, at most PIECE_ROWS at once."""
        keys = self._map("r")
        for start in range(0, len(keys), self.PIECE_ROWS):
            yield keys[start : start + self.PIECE_ROWS]

    def sort(self) -> Keys:
        """Sort the file in place and return it, mapped into memory."""
        keys = self._map("r+")
        keys.sort()
        return keys

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _map(self, mode: Any) -> Keys:
        if not self._rows:
            return np.empty(0, np.uint64)
        return np.memmap(self._file, dtype=np.uint64, mode=mode, shape=(self._rows,))
