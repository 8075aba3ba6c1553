"""The serving feed: what a reader asks a shard for, and what the shard's messages mean.

A reader says of which version of each table it is, and which buckets it holds whole. The shard answers with passes, one
every so often, for as long as the reader stays. In each pass, table by table:

- where there are buckets that the reader does not hold whole: ``WHOLE`` frames that name some of them, each followed by
  all of their rows, and one that names none; rows of these buckets that do not come are no more;
- frames with the rows that have changed since, their weights only, and with the ids of rows that were evicted;
- an ``END`` frame: the reader is now of the version, and of the time, that the frame says. Nothing else need be in it:
  a pass without changes tells the reader how far behind it is.

Each frame says the routes that the shard knew, so that a reader which knows older ones fetches them before it decides
which rows are this shard's to tell; and the shard's ``history``: versions of one history cannot be compared to those of
another, which a shard begins whenever it starts.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.errors import Refusal, RefusedError
from parameter_server.wire import Header

METHOD = "/recforge.Feed/Changes"
MAX_REQUEST_BYTES = 64 << 10
MIN_SECONDS = 0.01

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Mark(IntEnum):
    """What a frame of the feed means: its ``codec``. Its ``seq`` is the history, its ``clock`` is in microseconds."""

    CHANGED = 0  # rows and weights, or ids of rows that are no more
    WHOLE = 1  # ids are buckets, of which all rows follow, up to the next WHOLE frame; the last one names none
    END = 2  # of a table's part of a pass


@dataclass(frozen=True, kw_only=True)
class FeedRequest:
    """What a reader asks a shard for.

    Attributes:
        run_id: Of the run.
        history: That the versions are of; 0 where the reader has none.
        route_epoch: Of the shard's routes at that time.
        since: Versions of the tables, by number, that the reader is of.
        whole: [4096] buckets that it holds whole, as of these versions, packed into hexadecimal digits.
        seconds: Between passes.
    """

    run_id: int
    history: int
    route_epoch: int
    since: tuple[int, ...]
    whole: str
    seconds: float

    def encode(self) -> bytes:
        """Writes the request."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def decode(message: bytes) -> FeedRequest:
        """Reads what a reader has sent.

        Raises:
            RefusedError: With INVALID_ARGUMENT: it is not a request.
        """
        if len(message) > MAX_REQUEST_BYTES:
            raise _wrong(f"expected at most {MAX_REQUEST_BYTES} bytes, got {len(message)}")
        try:
            plain = json.loads(message)
            request = FeedRequest(**{**plain, "since": tuple(plain["since"])})
            unpack_buckets(request.whole)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _wrong(f"expected a request of this release, got {error!r}") from None
        numbers = (request.run_id, request.history, request.route_epoch, *request.since)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise _wrong("expected whole numbers >= 0 as run_id, history, route_epoch and since, got something else")
        if not isinstance(request.seconds, int | float) or not MIN_SECONDS <= request.seconds < 1e6:
            raise _wrong(f"expected seconds of at least {MIN_SECONDS}, got {request.seconds!r}")
        return request


class FeedConnection(Protocol):
    """How a reader follows one shard."""

    def follow(self, request: bytes) -> Iterator[bytes]:
        """Asks for the feed; gives its messages until one of both ends it.

        Raises:
            RefusedError: The shard has refused it.
            ConnectionLost: It cannot be reached.
        """

    def close(self) -> None:
        """Ends what is being followed; may be called from another thread."""


def pack_buckets(mask: Mask) -> str:
    """Writes a mask [4096] of buckets as text."""
    return np.packbits(mask).tobytes().hex()


def unpack_buckets(text: str) -> Mask:
    """Reads a mask [4096] of buckets.

    Raises:
        ValueError: It is none.
    """
    packed = np.frombuffer(binascii.unhexlify(text), np.uint8)
    if packed.size * 8 != NUM_BUCKETS:
        raise ValueError(f"whole: expected {NUM_BUCKETS} bits, got {packed.size * 8}")
    return np.unpackbits(packed).astype(np.bool_)


def mark_of(header: Header) -> Mark:
    """Gives what a frame means.

    Raises:
        RefusedError: It is not of a feed.
    """
    try:
        return Mark(header.codec)
    except ValueError:
        raise _wrong(f"expected one of the marks {[int(mark) for mark in Mark]}, got {header.codec}") from None


def _wrong(message: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_ARGUMENT, f"feed: {message}")
