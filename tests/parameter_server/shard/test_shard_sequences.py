"""Whatever happens to two shards, in whatever order, their tables are what a few lines of arrays say they should be."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parameter_server.partition import buckets_of, salt_of, spread_evenly

EVENTS = st.one_of(
    st.tuples(st.just("push"), st.integers(0, 2)),
    st.tuples(st.just("push"), st.integers(0, 2)),
    st.tuples(st.just("repeat"), st.integers(0, 2)),
    st.tuples(st.just("take over"), st.integers(0, 2)),
    st.tuples(st.just("crash"), st.integers(0, 1)),
    st.tuples(st.just("snapshot"), st.integers(0, 1)),
    st.tuples(st.just("move"), st.integers(0, 7)),
)


class TwoShards:
    """Two shards, and what should be in them: a global table and marks, and each shard's as of its last snapshot."""

    def __init__(self, run, durability: str) -> None:
        self.run, self.durability = run, durability
        self.owners = spread_evenly([0, 1])
        self.epoch = 1
        self.shards = {n: run.start(n, (0, 1), durability=durability, journal_sync="none") for n in (0, 1)}
        self.buckets = buckets_of(np.arange(500), salt_of("a"))
        self.table = np.zeros((500, 4), np.float32)
        self.marks = np.zeros((4, 4096), np.int64)
        self.saved = {n: (self.table.copy(), self.marks.copy()) for n in (0, 1)}
        self.unsaved, self.lost = {0: 0, 1: 0}, {0: 0, 1: 0}
        self.clock, self.lease = dict.fromkeys(range(3), 0), dict.fromkeys(range(3), 1)
        self.seq: dict[tuple[int, int], int] = {}
        self.last: dict[int, list] = {}

    def send(self, lane: int, clock: int) -> None:
        ids, gradients = self.run.rows(lane, clock)
        owner = self.owners[self.buckets[ids]]
        self.last[lane] = []
        for n in np.unique(owner).tolist():
            mine = owner == n
            self.seq[lane, n] = self.seq.get((lane, n), 0) + 1
            rows = (ids[mine], gradients[mine])
            head = {"lease": self.lease[lane], "seq": self.seq[lane, n], "rows": rows}
            assert self.run.push(self.shards[n], lane, clock, **head)
            self.last[lane].append((n, clock, head))
            self.unsaved[n] += 1
        fresh = self.marks[lane, self.buckets[ids]] < clock
        self.table[ids[fresh]] -= gradients[fresh]
        self.marks[lane, self.buckets[ids[fresh]]] = clock

    def push(self, lane: int) -> None:
        self.clock[lane] += 1
        self.send(lane, self.clock[lane])

    def repeat(self, lane: int) -> None:
        for n, clock, head in self.last.get(lane, []):
            assert not self.run.push(self.shards[n], lane, clock, **head)

    def take_over(self, lane: int) -> None:
        self.lease[lane] += 1
        for n in (0, 1):
            self.seq[lane, n] = 0
        for clock in range(max(1, self.clock[lane] - 3), self.clock[lane] + 1):
            self.send(lane, clock)

    def crash(self, n: int) -> None:
        self.shards[n].close()
        self.shards[n] = self.run.start(n, (0, 1), journal_sync="none")
        self.run.route(self.shards[n], self.owners, self.epoch)
        if self.durability == "snapshot":
            mine = self.owners == n
            table, marks = self.saved[n]
            self.table = np.where(mine[self.buckets][:, None], table, self.table)
            self.marks = np.where(mine, marks, self.marks)
            self.lost[n] += self.unsaved[n]
            self.unsaved[n] = 0
        assert self.shards[n].counts.lost_pushes == self.lost[n]

    def snapshot(self, n: int) -> None:
        self.shards[n].snapshot()
        self.saved[n] = (self.table.copy(), self.marks.copy())
        self.unsaved[n] = 0

    def move(self, eighth: int) -> None:
        moving = np.zeros(4096, bool)
        moving[512 * eighth : 512 * (eighth + 1)] = True
        source = int(self.owners[512 * eighth])
        target = 1 - source
        self.shards[target].drop_buckets(moving)
        chunks = list(self.shards[source].take_buckets(moving))
        self.shards[source].freeze(moving)
        chunks += self.shards[source].take_buckets(moving, self.shards[source].versions)
        self.shards[target].put_buckets(moving, chunks, is_last=True)
        if self.durability == "snapshot":
            self.snapshot(target)
        self.owners = np.where(moving, target, self.owners).astype(np.int32)
        self.epoch += 1
        for shard in self.shards.values():
            self.run.route(shard, self.owners, self.epoch)
        self.shards[source].drop_buckets(moving)
        self.snapshot_after_move(target)

    def snapshot_after_move(self, target: int) -> None:
        """What the target saved is of buckets which the model says are its own only by now."""
        if self.durability == "snapshot":
            self.saved[target] = (self.table.copy(), self.marks.copy())

    def check(self) -> None:
        ids = np.arange(500)
        owner = self.owners[self.buckets]
        for n, shard in self.shards.items():
            np.testing.assert_array_equal(self.run.pull(shard, ids=ids[owner == n]), self.table[owner == n])


def assert_table_after(make, durability: str, events: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = make(Path(folder))
        try:
            pair = TwoShards(run, durability)
            for name, number in events:
                getattr(pair, name.replace(" ", "_"))(number)
            pair.check()
            for n in (0, 1):
                pair.crash(n)
            pair.check()
        finally:
            run.close()


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_any_sequence_of_events_gives_the_table_that_it_should(run, durability):
    @settings(max_examples=12, deadline=None)
    @given(st.lists(EVENTS, max_size=30))
    def check_all(events):
        assert_table_after(type(run), durability, events)

    check_all()


@pytest.mark.long
@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_many_sequences_of_events(run, durability):
    @settings(max_examples=1000, deadline=None)
    @given(st.lists(EVENTS, max_size=80))
    def check_all(events):
        assert_table_after(type(run), durability, events)

    check_all()
