"""What tests of the shard share: small runs, pushes that follow from (lane, clock), and the tables they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embeddings.row_optimizers import RowSGD
from embeddings.tables import TableConfig
from parameter_server.description import RunDescription
from parameter_server.partition import Routes, spread_evenly
from parameter_server.shard.shard import Shard
from parameter_server.wire import NO_COUNTS, Flag, Frame, Header, Op, decode, encode, join

DIM, IDS = 4, 500


class Run:
    """A run of two tables that begin with zeros; integer gradients and a learning rate of 1 make sums exact."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[Shard] = []
        tables = tuple(
            TableConfig(name=name, num_rows=IDS, dim=DIM, init_scale=0.0, optimizer=RowSGD(learning_rate=1.0))
            for name in ("a", "b")
        )
        self.description = RunDescription(run_id=7, seed=1, tables=tables, lanes=4, durability="none")

    def start(
        self, number: int = 0, numbers: Sequence[int] = (0,), *, epoch: int = 1, name: str = "", **changes
    ) -> Shard:
        """Starts a shard with routes that spread buckets over some; ``changes`` are to the run's description."""
        sync = changes.pop("journal_sync", "group")
        self.description = replace(self.description, **changes)
        folder = None if self.description.durability == "none" else self.folder / (name or f"shard-{number}")
        shard = Shard(self.description, number, folder=folder, journal_sync=sync)
        self.shards.append(shard)
        self.route(shard, spread_evenly(numbers), epoch)
        return shard

    def route(self, shard: Shard, owners: np.ndarray, epoch: int) -> None:
        addresses = {n: f"local:{n}" for n in np.unique(owners).tolist()}
        shard.set_routes(Routes(epoch=epoch, owners=owners, addresses=addresses))

    def rows(self, lane: int, clock: int, table: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Gives the ids [n] and gradients [n, DIM] of a push; id ``lane`` gets -1 in each, so that it counts pushes."""
        random = np.random.default_rng([lane, clock, table])
        ids = np.unique(np.append(random.integers(100, IDS, 30), lane))
        gradients = random.integers(-8, 9, (len(ids), DIM)).astype(np.float32)
        gradients[ids == lane] = -1
        return ids, gradients

    def frame(self, lane: int, clock: int, *, lease: int = 1, seq: int | None = None, table: int = 0, **head) -> list:
        ids, gradients = head.pop("rows", None) or self.rows(lane, clock, table)
        counts = head.pop("counts", NO_COUNTS)
        seq = clock if seq is None else seq
        numbers = {"lane": lane, "lease": lease, "seq": seq, "clock": clock, "table": table}
        return encode(Header(Op.PUSH, run_id=self.description.run_id, **numbers, **head), ids, gradients, counts)

    def push(self, shard: Shard, lane: int, clock: int, **head) -> bool:
        """Pushes, and says whether it was new."""
        (answer,) = self.send(shard, [self.frame(lane, clock, **head)])
        return not answer.header.flags & Flag.DUPLICATE

    def send(self, shard: Shard, frames: list) -> list[Frame]:
        return decode(b"".join(shard.push(join(frames))))

    def pull(self, shard: Shard, table: int = 0, ids: np.ndarray | None = None) -> np.ndarray:
        ids = np.arange(IDS) if ids is None else ids
        asked = encode(Header(Op.PULL, run_id=self.description.run_id, table=table, dim=DIM), ids)
        return decode(b"".join(shard.pull(join([asked]))))[0].values

    def sums(self, pushes: Iterator[tuple[int, int]] | Sequence[tuple[int, int]], table: int = 0) -> np.ndarray:
        """Gives the table [IDS, DIM] that pushes (lane, clock), each applied once, add up to."""
        expected = np.zeros((IDS, DIM), np.float32)
        for lane, clock in pushes:
            ids, gradients = self.rows(lane, clock, table)
            expected[ids] -= gradients
        return expected

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run; its shards are closed at the end."""
    run = Run(tmp_path)
    yield run
    run.close()
