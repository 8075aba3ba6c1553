"""Rows beyond a table's memory, on disk, in RocksDB. It is no store of record: who opens it begins with none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.hashed.record_columns import meta_of
from embeddings.kernels.hash_kernels import NUM_BUCKETS, find_buckets

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Mask = NDArray[np.bool_]

_KEY = np.dtype([("bucket", ">u2"), ("id", ">u8")])  # so that a bucket's rows lie side by side, whoever asks for some
_NEVER = 2**32 - 1  # later than all times
_CHUNK = 1 << 14  # rows read at a time
_WRITE_BUFFER_BYTES = 16 << 20  # of which a table has two at most: rows went to disk for want of memory
_FILTER_BITS = 10  # per row, in memory: one in a hundred of rows that are not here is looked for on disk


class SpilledRows:
    """Records by id in a folder of their own, which is emptied first.

    Args:
        folder: Made if it is not there.
        record_width: Numbers per record.
        salt: Of hashes of ids.

    Attributes:
        newest: No row has a later version.
        oldest: No row was pushed before that time.

    Raises:
        ValueError: When ``rocksdict`` is not installed.
        OSError: When the folder cannot be used; and later, when it cannot be read or written any more.
    """

    def __init__(self, folder: Path, record_width: int, *, salt: np.uint64) -> None:
        try:
            rocksdict = import_module("rocksdict")
        except ImportError:
            raise ValueError("rocksdict is not installed; run: pip install 'recforge[spill]'") from None
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._rocksdict: Any = rocksdict
        with self._told():
            self._rows: Any = rocksdict.Rdict(str(folder), _make_options(rocksdict))
        self._options: Any = rocksdict.WriteOptions()
        self._options.disable_wal = True  # a restart reads rows from elsewhere
        self._width, self._salt = record_width, salt
        self._count = 0
        self.newest, self.oldest = -1, _NEVER

    def __len__(self) -> int:
        return self._count

    def write(self, ids: Longs, rows: Floats) -> None:
        """Writes records [n, record_width] of ids [n] that are not here."""
        self.overwrite(ids, rows)
        self._count += ids.size

    def overwrite(self, ids: Longs, rows: Floats) -> None:
        """Writes records [n, record_width] over those of ids [n] that are here."""
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for key, row in zip(self._keys(ids), rows, strict=True):
            batch.put(key, row.tobytes())
        self._write(batch)
        meta = meta_of(rows)
        self.newest = max(self.newest, int(meta.versions.max(initial=-1)))
        self.oldest = min(self.oldest, int(meta.seen.min(initial=_NEVER)))

    def read(self, ids: Longs) -> tuple[Mask, Floats]:
        """Says which of ids [n] are here, and gives the records of those."""
        with self._told():
            found = self._rows.get(self._keys(ids)) if self._count else [None] * ids.size
        here = np.array([value is not None for value in found], np.bool_)
        return here, self._records([value for value in found if value is not None])

    def take(self, ids: Longs) -> tuple[Mask, Floats]:
        """Does as ``read``, and removes what was here."""
        here, rows = self.read(ids)
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for key in self._keys(ids[here]):
            batch.delete(key)
        self._write(batch)
        self._count -= len(rows)
        return here, rows

    def remove(self, ids: Longs) -> int:
        """Removes ids [n]; those that are not here are left out. Returns how many were."""
        return len(self.take(ids)[1]) if self._count else 0

    def scan(self, buckets: Mask | None = None) -> Iterator[tuple[Longs, Floats]]:
        """Gives ids and records of all buckets, or of those in a mask [4096], some at a time.

        What is written meanwhile over rows that were given is not given again.
        """
        wanted = np.ones(NUM_BUCKETS, np.bool_) if buckets is None else buckets
        edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).reshape(-1, 2)
        items = chain.from_iterable(self._items(first, last) for first, last in edges.tolist())
        while self._count and (some := list(islice(items, _CHUNK))):
            keys = np.frombuffer(b"".join(key for key, _ in some), _KEY)
            yield keys["id"].astype(np.uint64).view(np.int64), self._records([row for _, row in some])

    def scan_seen_until(self, seen: float) -> Iterator[tuple[Longs, Floats]]:
        """Gives all that ``scan`` does, where a row may be there whose last push was at that time or before."""
        if self.oldest > seen + 1:  # ``seen`` may have been rounded
            return
        oldest = _NEVER
        for ids, rows in self.scan():
            oldest = min(oldest, int(meta_of(rows).seen.min()))
            yield ids, rows
        self.oldest = oldest

    def close(self) -> None:
        """Closes the files."""
        self._rows.close()

    def _write(self, batch: Any) -> None:
        with self._told():
            self._rows.write(batch, self._options)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # rocksdict has no other class for them
            raise OSError(f"{self._folder}: {error}") from error

    def _items(self, first: int, last: int) -> Iterator[tuple[bytes, bytes]]:
        # Keys and values of buckets [first, last). An upper bound in ReadOptions would dangle once they are collected.
        end = last.to_bytes(2, "big")
        return takewhile(lambda item: item[0] < end, self._rows.items(from_key=first.to_bytes(2, "big")))

    def _records(self, values: list[bytes]) -> Floats:
        return np.frombuffer(b"".join(values), np.float32).reshape(len(values), self._width)

    def _keys(self, ids: Longs) -> list[bytes]:
        ids, keys, buckets = np.ascontiguousarray(ids), np.empty(ids.size, _KEY), np.empty(ids.size, np.uint16)
        find_buckets(ids, self._salt, buckets)
        keys["bucket"], keys["id"] = buckets, ids.view(np.uint64)
        joined, each = keys.tobytes(), _KEY.itemsize
        return [joined[at : at + each] for at in range(0, len(joined), each)]


def _make_options(rocksdict: Any) -> Any:
    options, blocks = rocksdict.Options(raw_mode=True), rocksdict.BlockBasedOptions()
    blocks.set_bloom_filter(_FILTER_BITS, False)
    options.set_block_based_table_factory(blocks)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_compression_type(rocksdict.DBCompressionType.none())  # rows are noise to it
    return options
