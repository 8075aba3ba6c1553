"""Which shard holds which bucket, as the coordinator keeps it: the state's commit is the only truth about a move."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
from numpy.typing import NDArray

from parameter_server.coordinator.state import CoordinatorState, StoredShard
from parameter_server.errors import Refusal, RefusedError
from parameter_server.limits import MAX_SHARDS
from parameter_server.partition import Routes, spread_evenly

_FORGOTTEN_EPOCH = "forgotten epoch"


class RouteTable:
    """Shards and owners of buckets; callers hold the coordinator's lock, and write within ``state.change()``.

    Args:
        state: Where they are kept.
        start_shards: How many shards there have to be before buckets are given to them.

    Attributes:
        routes: None until then.
    """

    def __init__(self, state: CoordinatorState, *, start_shards: int) -> None:
        self._state = state
        self._start_shards = start_shards
        self._emptied_at: dict[int, int] = {}
        self.reload()

    def reload(self) -> None:
        """Reads everything from the state: at the start, and after a change that was rolled back."""
        self._shards = {shard.number: shard for shard in self._state.shards()}
        self._by_name = {shard.name: shard.number for shard in self._shards.values()}
        stored = self._state.routes()
        self.routes = None if stored is None else self._make(*stored)
        self._forgotten_epoch = int(self._state.setting(_FORGOTTEN_EPOCH) or 0)

    @property
    def epoch(self) -> int:
        """The routes' epoch; 0 before there are any."""
        return 0 if self.routes is None else self.routes.epoch

    def shard(self, number: int) -> StoredShard:
        """Gives a shard.

        Raises:
            RefusedError: With INVALID_ARGUMENT: there never was one of this number.
        """
        if (shard := self._shards.get(number)) is None:
            raise RefusedError(Refusal.INVALID_ARGUMENT, f"shard: expected one that has registered, got {number}")
        return shard

    def shards(self) -> list[StoredShard]:
        """Gives all shards that there ever were, by number."""
        return [self._shards[number] for number in sorted(self._shards)]

    def receivers(self) -> list[int]:
        """Gives the numbers of the shards that may hold buckets."""
        return [shard.number for shard in self.shards() if shard.state == "active"]

    def add_shard(self, name: str, address: str) -> int:
        """Adds a shard, or takes up one that comes back, and gives its number.

        One that had been drained begins anew. Routes come into being with the first ``start_shards`` shards; an
        address that changes makes new ones.
        """
        number = self._by_name.get(name)
        if number is None and len(self._shards) >= MAX_SHARDS:
            raise RefusedError(Refusal.RESOURCE_EXHAUSTED, f"shards: expected at most {MAX_SHARDS} names, got another")
        if number is None:
            shard = StoredShard(max(self._shards, default=-1) + 1, name, address, "active")
        else:
            known = self._shards[number]
            shard = known._replace(address=address, state="active" if known.state == "drained" else known.state)
        moved_house = number is not None and self._shards[number].address != address
        self._put(shard)
        receivers = self.receivers()
        if self.routes is None and len(receivers) >= self._start_shards:
            self.commit(spread_evenly(receivers))
        elif self.routes is not None and (moved_house or number is None):
            self.commit(self.routes.owners)
        return shard.number

    def commit(self, owners: NDArray[np.int32]) -> Routes:
        """Makes new routes, and marks shards that are being drained and have become empty."""
        epoch = max(self.epoch, self._forgotten_epoch) + 1
        self._state.put_routes(epoch, owners)
        held = set(np.unique(owners).tolist())
        for shard in self.shards():
            if shard.state == "draining" and shard.number not in held:
                self._put(shard._replace(state="drained"))
                self._emptied_at[shard.number] = epoch
        self.routes = self._make(epoch, owners)
        return self.routes

    def forget(self, names: Set[str]) -> None:
        """Forgets shards that have ended for good: others will be restored from their folders.

        Buckets are given to the next ``start_shards`` shards that register, by routes of a later epoch. Names that are
        not known, or hold nothing, change nothing: it may be said again.

        Raises:
            ValueError: A shard that holds buckets is not named.
        """
        if self.routes is None or not any(
            self.routes.owned_by(self._by_name[n]).any() for n in names & self._by_name.keys()
        ):
            return
        for shard in self.shards():
            if shard.name not in names and self.routes.owned_by(shard.number).any():
                raise ValueError(
                    f"--forget-shards: expected all shards that hold buckets, got none named {shard.name!r}; their "
                    "buckets go to new shards together"
                )
        for shard in self.shards():
            self._put(shard._replace(state="drained"))
        self._state.set_setting(_FORGOTTEN_EPOCH, str(self.epoch))
        self._state.remove_routes()
        self.reload()

    def choose(self, names: Sequence[str]) -> list[str]:
        """Says which shards must be started for a run to go on with shards of some names; none may be running.

        Others that hold buckets are among them, and will be emptied; by name they end when they are.
        """
        held = set() if self.routes is None else set(np.unique(self.routes.owners).tolist())
        leaving = []
        for shard in self.shards():
            if shard.name in names:
                self._put(shard._replace(state="active" if shard.state == "draining" else shard.state))
            else:
                self._put(shard._replace(state="draining" if shard.number in held else "drained"))
                leaving += [shard.name] if shard.number in held else []
        return [*names, *leaving]

    def drain(self, number: int) -> None:
        """Marks a shard as one that is to hold nothing.

        Raises:
            RefusedError: INVALID_ARGUMENT: no such shard. FAILED_PRECONDITION: it is the last one.
        """
        shard = self.shard(number)
        if shard.state != "active":
            return
        if len(self.receivers()) < 2:
            raise RefusedError(
                Refusal.FAILED_PRECONDITION,
                f"drain: expected another shard to take what shard {number} holds, got none",
            )
        self._put(shard._replace(state="draining"))
        if self.routes is not None and not self.routes.owned_by(number).any():
            self.commit(self.routes.owners)

    def is_drained(self, number: int) -> bool:
        """Says whether a shard holds nothing and will get nothing."""
        return self._shards[number].state == "drained"

    def emptied_at(self, number: int) -> int:
        """Gives an epoch of routes in which a drained shard holds nothing: after a restart, the current one."""
        return self._emptied_at.get(number, self.epoch)

    def _make(self, epoch: int, owners: NDArray[np.int32]) -> Routes:
        addresses = {shard.number: shard.address for shard in self._shards.values() if shard.state != "drained"}
        return Routes(epoch=epoch, owners=owners, addresses=addresses)

    def _put(self, shard: StoredShard) -> None:
        self._state.put_shard(shard)
        self._shards[shard.number] = shard
        self._by_name[shard.name] = shard.number
