"""A file of records, one after the other, each checked; tells a tail that was never finished from a damaged record.

A record, little-endian, is a head of 48 bytes and a body: ``magic u32 | kind u32 | number u64 | length u64 |
seconds f64 | XXH3 of the body u64 | XXH3 of the head before it u64``. Numbers count up by one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import xxhash

from parameter_server.shard.synced_files import sync_path

_HEAD = struct.Struct("<IIQQdQQ")
_MAGIC = 0x4A464352  # "RCFJ"
_CHECKED = _HEAD.size - 8


class Kind(IntEnum):
    """What a record did to its shard."""

    PUSH = 1  # a frame
    DENSE = 2  # a frame
    EVICT = 3
    PUT = 4  # a chunk of buckets' rows from another shard
    CLAIM = 5  # [4096] int64: the claims of all buckets, see ``ShardState``
    DROP = 6  # a mask of buckets
    STORE = 7  # a message that overwrites whole rows, see ``row_storage``


class Record(NamedTuple):
    """A checked record."""

    kind: int
    number: int
    seconds: float
    body: bytes


class DamagedError(ValueError):
    """A file holds something else than was written; nobody can say what is missing, so nothing goes on from it."""


def head_of(kind: Kind, number: int, seconds: float, body: Sequence[bytes | memoryview]) -> bytes:
    """Makes the head of a record whose body is given in pieces."""
    digest = xxhash.xxh3_64()
    for piece in body:
        digest.update(piece)
    length = sum(memoryview(piece).nbytes for piece in body)
    head = _HEAD.pack(_MAGIC, kind, number, length, seconds, digest.intdigest(), 0)[:_CHECKED]
    return head + xxhash.xxh3_64_digest(head)[::-1]


class RecordsFile:
    """The records of a file.

    Attributes:
        end: While and after these are read: where the last whole one ends.
        torn_bytes: After these are read: what follows it, part of a record that was never finished.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        self.end = 0
        self.torn_bytes = 0
        self._number = number

    def __iter__(self) -> Iterator[Record]:
        """Reads the records.

        Raises:
            DamagedError: A record is damaged, and whole ones follow; or it has another number than it should.
        """
        size = os.path.getsize(self.path)
        with self.path.open("rb") as file:
            while self.end < size:
                head = _read_head(file.read(_HEAD.size))
                if head is None or head[2] > size - file.tell():
                    return self._end_torn(size)
                kind, number, length, seconds, digest = head
                body = file.read(length)
                if xxhash.xxh3_64_intdigest(body) != digest:
                    return self._end_torn(size)
                if number != self._number:
                    raise DamagedError(f"{self._here()}: expected record {self._number}, got record {number}")
                yield Record(kind, number, seconds, body)
                self._number += 1
                self.end = file.tell()

    def cut(self) -> None:
        """Cuts the torn tail off, for good: after a power cut it would be damage in the middle of the journal."""
        if self.torn_bytes:
            os.truncate(self.path, self.end)
            sync_path(self.path)

    def _end_torn(self, size: int) -> None:
        if (after := _find_record(self.path, self.end + 1)) is not None:
            raise DamagedError(
                f"{self._here()}: expected record {self._number}, got damaged bytes, with whole records again from "
                f"byte {after}: the disk or somebody changed the file; restore the folder from a copy"
            )
        self.torn_bytes = size - self.end

    def _here(self) -> str:
        return f"{self.path}, byte {self.end}"


def _read_head(head: bytes) -> tuple[int, int, int, float, int] | None:
    if len(head) < _HEAD.size:
        return None
    magic, kind, number, length, seconds, digest, checksum = _HEAD.unpack(head)
    if magic != _MAGIC or checksum != xxhash.xxh3_64_intdigest(head[:_CHECKED]):
        return None
    return kind, number, length, seconds, digest


def _find_record(path: Path, start: int) -> int | None:
    """Looks for a whole head after a place: a record follows what is damaged, and was written after it."""
    mark = _MAGIC.to_bytes(4, "little")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        place = content.find(mark, start)
        while place >= 0:
            if _read_head(content[place : place + _HEAD.size]) is not None:
                return place
            place = content.find(mark, place + 1)
    return None
