"""Cuts the rows of pulls and pushes by shard, and into frames that are short enough; buckets of a push stay whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import BUCKET_BITS, NUM_BUCKETS
from embeddings.kernels.routing_kernels import find_not_finite, gather_rows, sort_rows
from parameter_server.partition import Buckets, Routes, buckets_of
from parameter_server.wire import (
    DTYPES,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    NO_COUNTS,
    Counts,
    Header,
    Longs,
    Op,
    Type,
    Values,
    frame_bytes,
)

_PADDING = 48  # of ids, values and counts


class Push(NamedTuple):
    """Gradients of rows of one table.

    Attributes:
        table: Its number in the run's description.
        ids: [n] int64, each once.
        gradients: [n, dim] float32, in their order.
        versions: Of the pull that they were computed from, by shard.
        factor: Multiplies the learning rate.
        eps_factor: Multiplies ``eps``.
        counts: [n] uint32, at least 1: how often each id occurred, which ``RowCowClip`` asks for; empty: once each.
    """

    table: int
    ids: Longs
    gradients: NDArray[Any]
    versions: Mapping[int, int] = {}
    factor: float = 1.0
    eps_factor: float = 1.0
    counts: Counts = NO_COUNTS


class Piece(NamedTuple):
    """Rows of a push for one shard, in the order in which they travel: each bucket's together."""

    shard: int
    header: Header
    ids: Longs
    values: Values
    buckets: Buckets
    counts: Counts = NO_COUNTS


class Order:
    """The order in which rows travel under some routes: by shard, and by hash within a shard.

    Args:
        routes: Say which shard holds which bucket.
    """

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        by_owner = np.argsort(routes.owners, kind="stable")
        self.ranks = np.empty(NUM_BUCKETS, np.int32)
        self.ranks[by_owner] = np.arange(NUM_BUCKETS, dtype=np.int32)
        self.shards, counts = np.unique(routes.owners, return_counts=True)
        self._last_ranks = np.cumsum(counts) - 1

    def split(self, push: Push, name: str, salt: np.uint64, kind: Type) -> list[Piece]:
        """Splits a push by shard; copies its rows.

        Args:
            push: All of one table.
            name: Of the table.
            salt: Of the table.
            kind: Of the values that travel.

        Raises:
            ValueError: Shapes do not fit, an id comes twice, or a gradient is not finite as it travels.
        """
        n = len(push.gradients)
        if push.gradients.ndim != 2 or push.ids.shape != (n,) or push.counts.shape not in ((n,), (0,)):
            got = f"{push.gradients.shape} and {push.counts.shape} for ids {push.ids.shape}"
            raise ValueError(f"push to table {name!r}: expected gradients [n, dim], counts [n] or [0], got {got}")
        hashes, order, ends = np.empty(n, np.uint64), np.empty(n, np.int64), np.empty(NUM_BUCKETS, np.int64)
        twice = sort_rows(np.ascontiguousarray(push.ids), salt, self.ranks, hashes, order, ends)
        if twice >= 0:
            raise ValueError(f"push to table {name!r}: expected each id once, got {push.ids[twice]} twice")
        ids = push.ids[order]
        values = np.empty(push.gradients.shape, DTYPES[kind])
        if not gather_rows(np.ascontiguousarray(push.gradients, np.float32), order, values):
            raise ValueError(_describe_wrong(push, name, int(order[find_not_finite(values)])))
        counts = push.counts[order] if push.counts.size else push.counts
        buckets = (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.uint16)
        pieces, start = [], 0
        for shard, end in zip(self.shards.tolist(), ends[self._last_ranks].tolist(), strict=True):
            if end > start:
                head = Header(
                    op=Op.PUSH,
                    table=push.table,
                    route_epoch=self.routes.epoch,
                    version=push.versions.get(shard, 0),
                    factor=push.factor,
                    eps_factor=push.eps_factor,
                )
                mine = slice(start, end)
                pieces.append(Piece(shard, head, ids[mine], values[mine], buckets[mine], counts[mine]))
            start = end
        return pieces

    def split_places(self, ids: Longs, salt: np.uint64) -> list[tuple[int, Longs]]:
        """Gives, of each shard that holds any of some ids [n], its number and where in ``ids`` they are."""
        if len(self.shards) == 1 or not ids.size:
            return [(int(self.shards[0]), np.arange(ids.size))] if ids.size else []
        owners = self.routes.owners[buckets_of(ids, salt)]
        places = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[places], self.shards, side="right").tolist()
        parts = zip(self.shards.tolist(), [0, *ends], ends, strict=False)
        return [(shard, places[start:end]) for shard, start, end in parts if end > start]


def resplit(ids: Longs, salt: np.uint64, owners: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Gives, of each shard that holds any of some ids by now, its number and which of them [n]."""
    theirs = owners[buckets_of(ids, salt)]
    for shard in np.unique(theirs).tolist():
        yield shard, theirs == shard


def cut_piece(piece: Piece) -> Iterator[Piece]:
    """Cuts a piece into ones that make frames of at most MAX_FRAME_BYTES, at borders of buckets.

    Raises:
        ValueError: A bucket alone is longer than a message may be.
    """
    n, dim = piece.values.shape
    count_bytes = piece.counts.itemsize if piece.counts.size else 0
    start, most = 0, rows_per_frame(dim * piece.values.itemsize + piece.ids.itemsize + count_bytes)
    while start < n:
        end = min(start + most, n)
        if end < n:
            bucket = piece.buckets[end]
            end = start + int(np.searchsorted(piece.buckets[start:end], bucket))
            if end == start:
                end = int(np.count_nonzero(piece.buckets[start:] == bucket)) + start
                kind = Type.FP16 if piece.values.itemsize == 2 else Type.FP32
                has_counts = bool(piece.counts.size)
                length = frame_bytes(end - start, dim, kind, has_ids=True, has_values=True, has_counts=has_counts)
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(
                        f"push: expected at most {MAX_MESSAGE_BYTES} bytes of one bucket of 4,096, got {length}; "
                        "push fewer rows at a time"
                    )
        part = slice(start, end)
        yield Piece(
            piece.shard, piece.header, piece.ids[part], piece.values[part], piece.buckets[part], piece.counts[part]
        )
        start = end


def rows_per_frame(bytes_per_row: int) -> int:
    """Says how many rows make a frame of at most MAX_FRAME_BYTES; at least one."""
    return max(1, (MAX_FRAME_BYTES - HEADER_BYTES - _PADDING) // bytes_per_row)


def pull_rows_per_frame(dim: int, kind: Type) -> int:
    """Says how many rows a pull may ask for in one frame, so that neither it nor its answer is too long."""
    return rows_per_frame(max(8, dim * DTYPES[kind].itemsize))


def _describe_wrong(push: Push, name: str, row: int) -> str:
    place, gradient = f"push to table {name!r}, id {push.ids[row]}", push.gradients[row]
    if not np.isfinite(gradient).all():
        return f"{place}: expected a finite gradient, got {gradient[~np.isfinite(gradient)][0]}"
    largest = gradient[np.abs(gradient).argmax()]
    return f"{place}: expected gradients within 65504, as they travel as fp16, got {largest}; use --value-type fp32"
