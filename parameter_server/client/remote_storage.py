"""Whole tables on shards as checkpoints read and write them: block by block, so that nobody must hold one.

A row that no push has created reads as it would be born, with a state of zeros: a table of a run that went on for ten
steps is as complete as that of a synchronous run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.row_optimizers import counts_updates
from embeddings.tables import TableConfig
from parameter_server.client.damaged_answers import decode_answer
from parameter_server.client.retries import Patience, passes
from parameter_server.client.shard_connections import RoutesSource, RoutesWatch, ShardConnections
from parameter_server.description import RunDescription
from parameter_server.partition import Routes, buckets_of, salt_of
from parameter_server.shard.row_storage import SET_UPDATES, columns_of, join_rows, split_rows
from parameter_server.transports import ShardConnection
from parameter_server.wire import Frame, Header, Op, encode, join

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]
Result = TypeVar("Result")

BLOCK_BYTES = 4 << 20
LARGEST_TABLE = 1 << 32  # rows; a synchronous run can have no larger one


class RemoteStorage:
    """The rows of a run on all its shards.

    Args:
        description: Of the run.
        routes: Which shard holds which rows.
        connect: Makes a connection to an address; they are closed with the storage.
        deadline_seconds: How long to try where a shard does not answer.
    """

    def __init__(
        self,
        description: RunDescription,
        routes: RoutesSource,
        connect: Callable[[str], ShardConnection],
        *,
        deadline_seconds: float = 120.0,
    ) -> None:
        self.description = description
        self._routes, self._deadline_seconds = routes, deadline_seconds
        self._connections = ShardConnections(connect)
        self._watch = RoutesWatch(routes, self._connections.keep)
        self._closed = threading.Event()
        self._salts = [salt_of(config.name) for config in description.tables]

    def tables(self) -> list[RemoteTable]:
        """Gives the tables, in the order of their numbers."""
        return [RemoteTable(self, number) for number in range(len(self.description.tables))]

    def close(self) -> None:
        """Closes the connections; what is under way ends with an error."""
        self._closed.set()
        self._connections.close()
        self._watch.close()

    def read(self, table: int, ids: Longs) -> Floats:
        """Reads rows with their states, [n, width] as ``join_rows`` orders them; ``ids`` ascend."""
        width = sum(columns_of(self.description.tables[table]).values())
        out = np.empty((ids.size, width), np.float32)

        def ask(routes: Routes) -> None:
            for places, answer in self._ask_owners(routes, table, ids, None, width):
                out[places] = answer.values

        self._try(ask)
        return out

    def write(self, table: int, ids: Longs, rows: Floats) -> None:
        """Overwrites rows with their states; ``ids`` ascend."""
        self._try(lambda routes: self._ask_owners(routes, table, ids, rows, rows.shape[1]))

    def read_updates(self, table: int) -> int:
        """Reads how often a table has been updated."""
        # Shards hear of each clock, but for those whose pushes are under way or were lost.
        return max(frame.header.clock for frame in self._ask_all(Header(op=Op.RECORDS, table=table)))

    def write_updates(self, table: int, updates: int) -> None:
        """Sets how often a table has been updated."""
        self._ask_all(Header(op=Op.RECORDS, table=table, codec=SET_UPDATES, clock=updates))

    def _ask_owners(
        self, routes: Routes, table: int, ids: Longs, rows: Floats | None, width: int
    ) -> list[tuple[Longs, Frame]]:
        """Sends each shard its part of some rows; returns their places and the answer."""
        owners = routes.owners[buckets_of(ids, self._salts[table])]
        header = Header(op=Op.RECORDS, run_id=self.description.run_id, table=table, route_epoch=routes.epoch, dim=width)
        asked = []
        for shard in np.unique(owners).tolist():
            (places,) = np.nonzero(owners == shard)
            values = None if rows is None else np.ascontiguousarray(rows[places])
            message = join([encode(header, ids[places], values)])
            asked.append((places, self._send(routes.addresses[shard], message)))
        return [(places, decode_answer(answer.result())[0]) for places, answer in asked]

    def _ask_all(self, header: Header) -> list[Frame]:
        message = join([encode(header._replace(run_id=self.description.run_id))])

        def ask(routes: Routes) -> list[Frame]:
            shards = np.unique(routes.owners).tolist()
            asked = [self._send(routes.addresses[shard], message) for shard in shards]
            return [decode_answer(answer.result())[0] for answer in asked]

        return self._try(ask)

    def _send(self, address: str, message: bytes) -> Future[bytes]:
        return self._connections.to(address).store(message)

    def _try(self, ask: Callable[[Routes], Result]) -> Result:
        """Asks until all shards have answered; reading and overwriting may be done again.

        Raises:
            ShardUnreachableError: Some have not, for too long.
            RefusedError: What was asked for is wrong.
        """
        patience = Patience(self._deadline_seconds)
        while True:
            routes = self._routes.current()
            try:
                return ask(routes)
            except Exception as error:
                if self._closed.is_set() or not passes(error):
                    raise
                delay = patience.fail("rows", error)
                self._watch.ask(routes.epoch)  # beside this: the coordinator may be away for longer
            self._closed.wait(delay)


class RemoteTable:
    """One table on all shards; see ``FarTable``.

    Raises:
        ValueError: When it has too many rows for a checkpoint of all of them.
    """

    def __init__(self, storage: RemoteStorage, number: int) -> None:
        self._storage, self._number = storage, number
        self._config = storage.description.tables[number]
        if self._config.num_rows > LARGEST_TABLE:
            raise ValueError(
                f"table {self._config.name!r}: expected at most {LARGEST_TABLE} rows in a checkpoint of all rows, got "
                f"{self._config.num_rows}; shards' own snapshots keep tables without bounds"
            )
        row_bytes = 4 * sum(columns_of(self._config).values()) + 8
        self._step = max(1, BLOCK_BYTES // row_bytes)

    @property
    def config(self) -> TableConfig:
        """The table."""
        return self._config

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See ``FarTable``."""
        rows = self._config.num_rows
        empty = split_rows(self._config, np.empty((0, sum(columns_of(self._config).values())), np.float32))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((rows, *part.shape[1:]), torch.float32) for name, part in empty.items()
        }
        return shapes | ({"updates": ((), torch.float64)} if self._has_updates else {})

    def read(self, first: int, last: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """See ``FarTable``."""
        out = {
            name: torch.empty((last - first, *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in self.tensors().items()
            if shape and (names is None or name in names)
        }
        for start in range(first, last, self._step):
            end = min(start + self._step, last)
            parts = split_rows(self._config, self._storage.read(self._number, np.arange(start, end)))
            for name, tensor in out.items():
                tensor[start - first : end - first] = torch.from_numpy(parts[name])
        return out

    def write(self, first: int, tensors: Mapping[str, Tensor]) -> None:
        """See ``FarTable``."""
        rows = join_rows(self._config, {name: tensor.numpy() for name, tensor in tensors.items()})
        for start in range(0, len(rows), self._step):
            some = rows[start : start + self._step]
            self._storage.write(self._number, np.arange(first + start, first + start + len(some)), some)

    def read_counters(self) -> dict[str, Tensor]:
        """See ``FarTable``."""
        if not self._has_updates:
            return {}
        return {"updates": torch.tensor(self._storage.read_updates(self._number), dtype=torch.float64)}

    def write_counters(self, counters: Mapping[str, Tensor]) -> None:
        """See ``FarTable``."""
        if self._has_updates:
            self._storage.write_updates(self._number, int(counters["updates"]))

    @property
    def _has_updates(self) -> bool:
        return counts_updates(self._config.optimizer, self._config.row_type)
