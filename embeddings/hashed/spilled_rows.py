"""Rows beyond a table's memory, on disk, in RocksDB. It is no store of record: who opens it begins with none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.record_columns import meta_of

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]

_KEY = np.dtype(">u8")
_CHUNK = 1 << 14  # rows read at a time


class SpilledRows:
    """Records by id in a folder of their own, which is emptied first.

    Args:
        folder: Made if it is not there.
        record_width: Numbers per record.

    Raises:
        ValueError: When ``rocksdict`` is not installed.
    """

    def __init__(self, folder: Path, record_width: int) -> None:
        try:
            rocksdict = import_module("rocksdict")
        except ImportError:
            raise ValueError("rocksdict is not installed; run: pip install 'recforge[spill]'") from None
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._rocksdict: Any = rocksdict
        self._rows: Any = rocksdict.Rdict(str(folder), rocksdict.Options(raw_mode=True))
        self._options: Any = rocksdict.WriteOptions()
        self._options.disable_wal = True  # a restart reads rows from elsewhere
        self._width = record_width
        self._count = 0
        self.newest = -1  # no row has a later version

    def __len__(self) -> int:
        return self._count

    def write(self, ids: Longs, rows: Floats) -> None:
        """Writes records [n, record_width] of ids [n] that are not here."""
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for key, row in zip(_keys(ids), rows, strict=True):
            batch.put(key, row.tobytes())
        self._rows.write(batch, self._options)
        self._count += ids.size
        if ids.size:
            self.newest = max(self.newest, int(meta_of(rows).versions.max()))

    def read(self, ids: Longs) -> tuple[Mask, Floats]:
        """Says which of ids [n] are here, and gives the records of those."""
        found = self._rows.get(_keys(ids)) if self._count else [None] * ids.size
        here = np.array([value is not None for value in found], np.bool_)
        return here, self._records([value for value in found if value is not None])

    def remove(self, ids: Longs) -> int:
        """Removes ids [n]; those that are not here are left out. Returns how many were."""
        if not self._count:
            return 0
        here, _ = self.read(ids)
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for key in _keys(ids[here]):
            batch.delete(key)
        self._rows.write(batch, self._options)
        removed = int(here.sum())
        self._count -= removed
        return removed

    def scan(self) -> Iterator[tuple[Longs, Floats]]:
        """Gives all ids and records, some at a time, as they are at the first."""
        items = iter(self._rows.items() if self._count else ())
        while some := list(islice(items, _CHUNK)):
            keys = np.frombuffer(b"".join(key for key, _ in some), _KEY)
            yield keys.astype(np.uint64).view(np.int64), self._records([row for _, row in some])

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()

    def _records(self, values: list[bytes]) -> Floats:
        return np.frombuffer(b"".join(values), np.float32).reshape(len(values), self._width)


def _keys(ids: Longs) -> list[bytes]:
    joined, each = np.ascontiguousarray(ids).view(np.uint64).astype(_KEY).tobytes(), _KEY.itemsize
    return [joined[at : at + each] for at in range(0, len(joined), each)]
