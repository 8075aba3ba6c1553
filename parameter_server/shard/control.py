"""What the coordinator asks of a shard when buckets move, so that no late message of one move disturbs the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.errors import Refusal, RefusedError, wrong
from parameter_server.partition import Routes

Mask = NDArray[np.bool_]
MAX_FREEZE_SECONDS = 10.0


class MovableShard(Protocol):
    """What is needed of a ``Shard``."""

    number: int

    @property
    def versions(self) -> list[int]:
        """Of its tables."""

    def set_routes(self, routes: Routes) -> None:
        """Takes newer routes over."""

    def freeze(self, buckets: Mask) -> None:
        """Refuses pushes to buckets for a moment."""

    def thaw(self, buckets: Mask) -> None:
        """Takes them again."""

    def take_buckets(self, buckets: Mask, since: Sequence[int]) -> Iterator[bytes]:
        """Gives what lies in buckets."""

    def put_buckets(self, buckets: Mask, chunks: Sequence[bytes], *, is_last: bool) -> None:
        """Takes over what another shard gave."""

    def drop_buckets(self, buckets: Mask) -> None:
        """Forgets what lies in buckets."""

    def snapshot(self) -> Any:
        """Writes a snapshot."""


class Taken(NamedTuple):
    """What one shard gives to another.

    Attributes:
        versions: Of the tables, when it began: a later pass starts there.
        chunks: For ``put_buckets``.
    """

    versions: list[int]
    chunks: Iterator[bytes]


class Copied(NamedTuple):
    """What one pass has copied."""

    versions: list[int]
    bytes: int


class ShardLink(Protocol):
    """A shard, as the coordinator and other shards see it; ``ShardControl`` describes the calls."""

    def set_routes(self, routes: Routes) -> None:
        """Takes newer routes over."""

    def settle(self, order: int, routes: Routes) -> None:
        """Ends what was begun before."""

    def freeze(self, order: int, buckets: Mask, seconds: float) -> None:
        """Refuses pushes to buckets for so long at most."""

    def keep_frozen(self, order: int) -> None:
        """Lets a freeze last."""

    def thaw(self, order: int) -> None:
        """Ends a freeze."""

    def copy(self, order: int, address: str, buckets: Mask, since: Sequence[int], *, is_last: bool) -> Copied:
        """Copies buckets from another shard to this one."""

    def take(self, buckets: Mask, since: Sequence[int]) -> Taken:
        """Gives what is in buckets."""

    def snapshot(self) -> None:
        """Writes a snapshot."""

    def close(self) -> None:
        """Ends the connection."""


@dataclass
class _Freeze:
    buckets: Mask
    timer: threading.Timer


class ShardControl:
    """A shard's part in moves of buckets; each order has a number, and older ones than the last are refused.

    Args:
        shard: Is not closed with it.
        connect: Opens the way to another shard at an address.
    """

    def __init__(self, shard: MovableShard, connect: Callable[[str], ShardLink]) -> None:
        self._shard = shard
        self._connect = connect
        self._lock = threading.Lock()  # held while rows are taken over or dropped: an order waits for the one before
        self._order = 0
        self._freezes: dict[int, _Freeze] = {}
        self._owned = np.zeros(NUM_BUCKETS, np.bool_)

    def set_routes(self, routes: Routes) -> None:
        """Takes newer routes over; older ones change nothing."""
        with self._lock:
            self._take_over(routes)

    def settle(self, order: int, routes: Routes) -> None:
        """Takes routes over, ends all freezes, and drops what lies elsewhere: rows that moved, or that came in vain.

        Raises:
            RefusedError: With FAILED_PRECONDITION: a newer order has come.
        """
        with self._lock:
            self._advance(order)
            self._take_over(routes)
            for begun in list(self._freezes):
                self._end(begun)
            self._shard.thaw(np.ones(NUM_BUCKETS, np.bool_))
            elsewhere = ~routes.owned_by(self._shard.number)
            if elsewhere.any():
                self._shard.drop_buckets(elsewhere)

    def freeze(self, order: int, buckets: Mask, seconds: float) -> None:
        """Refuses pushes to buckets [4096], until thawed, settled, or for so many seconds unless it is kept.

        Raises:
            RefusedError: INVALID_ARGUMENT: for too long. FAILED_PRECONDITION: a newer order has come.
        """
        if not 0 < seconds <= MAX_FREEZE_SECONDS:
            raise wrong(f"freeze: expected at most {MAX_FREEZE_SECONDS} seconds, got {seconds}")
        with self._lock:
            self._advance(order)
            timer = threading.Timer(seconds, self._expire, (order,))
            timer.daemon = True
            self._freezes[order] = _Freeze(buckets, timer)
            self._shard.freeze(buckets)
            timer.start()

    def keep_frozen(self, order: int) -> None:
        """Lets a freeze last: from now on this shard does not decide any more whose these buckets are.

        Raises:
            RefusedError: With FAILED_PRECONDITION: it is over, and pushes may have been applied since.
        """
        with self._lock:
            if (freeze := self._freezes.get(order)) is None:
                raise RefusedError(Refusal.FAILED_PRECONDITION, f"freeze {order}: expected it to hold, but it is over")
            freeze.timer.cancel()

    def thaw(self, order: int) -> None:
        """Ends a freeze; to say it twice changes nothing."""
        with self._lock:
            self._end(order)

    def copy(self, order: int, address: str, buckets: Mask, since: Sequence[int], *, is_last: bool) -> Copied:
        """Copies buckets [4096] from another shard to this one.

        Args:
            order: Its number.
            address: Of the other shard.
            buckets: Which.
            since: Versions of the tables there, after which rows are wanted; none: all.
            is_last: Whether the buckets are whole here with this pass.

        Raises:
            RefusedError: With FAILED_PRECONDITION: a newer order has come.
            ConnectionLost: The other shard is gone.
        """
        with self._lock:
            self._advance(order)
            if (self._owned & buckets).any():
                raise RefusedError(
                    Refusal.FAILED_PRECONDITION, "copy: expected buckets of others, got this shard's own"
                )
        source = self._connect(address)
        try:
            taken = source.take(buckets, since)
            size = 0
            for chunk in taken.chunks:
                self._put(order, buckets, [chunk], is_last=False)
                size += len(chunk)
            if is_last:
                self._put(order, buckets, [], is_last=True)
            return Copied(taken.versions, size)
        finally:
            source.close()

    def take(self, buckets: Mask, since: Sequence[int]) -> Taken:
        """Gives what is in buckets [4096], or what has changed there since some versions."""
        if since and len(since) != len(self._shard.versions):
            raise wrong(f"take: expected versions of {len(self._shard.versions)} tables, got {len(since)}")
        versions = list(self._shard.versions)
        return Taken(versions, self._shard.take_buckets(buckets, since))

    def snapshot(self) -> None:
        """Writes a snapshot.

        Raises:
            RefusedError: The shard has no folder, or cannot write to it.
        """
        try:
            self._shard.snapshot()
        except RefusedError:
            raise
        except ValueError as error:
            raise RefusedError(Refusal.FAILED_PRECONDITION, str(error)) from error

    def close(self) -> None:
        """Ends nothing: within one process, it is the connection as well."""

    def stop(self) -> None:
        """Lets go of the shard."""
        with self._lock:
            for begun in list(self._freezes):
                self._freezes.pop(begun).timer.cancel()

    def _put(self, order: int, buckets: Mask, chunks: Sequence[bytes], *, is_last: bool) -> None:
        with self._lock:
            if order != self._order:
                raise _late(order, self._order)
            self._shard.put_buckets(buckets, chunks, is_last=is_last)

    def _take_over(self, routes: Routes) -> None:
        self._shard.set_routes(routes)
        self._owned = routes.owned_by(self._shard.number)

    def _advance(self, order: int) -> None:
        if order <= self._order:
            raise _late(order, self._order)
        self._order = order

    def _expire(self, order: int) -> None:
        with self._lock:
            freeze = self._freezes.get(order)
            # A timer that was cancelled a moment too late is marked as such.
            if freeze is not None and not freeze.timer.finished.is_set():
                self._end(order)

    def _end(self, order: int) -> None:
        if (freeze := self._freezes.pop(order, None)) is not None:
            freeze.timer.cancel()
            self._shard.thaw(freeze.buckets)


def _late(order: int, newest: int) -> RefusedError:
    return RefusedError(Refusal.FAILED_PRECONDITION, f"order {order}: expected a newer one than {newest}")
