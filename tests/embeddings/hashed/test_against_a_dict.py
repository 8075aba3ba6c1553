"""Any sequence of calls leaves a table on demand with what a few dicts of numpy rows would hold."""

from __future__ import annotations

import itertools
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings import RowSGD, TableConfig
from embeddings.hashed.growth import Growth
from embeddings.hashed.hashed_table import HashedTable
from embeddings.initial_rows import initial_rows, random_stream
from embeddings.kernels.hash_kernels import find_buckets
from embeddings.tables import UNBOUNDED

DIM, SALT = 3, np.uint64(5)
ROW_BYTES = 4 * (DIM + 1 + 4 + 2)
CONFIG = TableConfig(name="a", num_rows=UNBOUNDED, dim=DIM, init_scale=0.5, optimizer=RowSGD(learning_rate=1.0))
IDS = [*range(40), -1, 2**63 - 1, -(2**63)]
GROWTHS = {
    "keep all": Growth(),
    "admit": Growth(admit_after=2),
    "admit by chance": Growth(admit_after=2, admit_probability=0.5),
    "age": Growth(evict_after_seconds=20, evict_below_count=3),
    "room": Growth(max_bytes=16 * ROW_BYTES),
    "everything": Growth(admit_after=2, admit_probability=0.7, evict_after_seconds=20, max_bytes=16 * ROW_BYTES),
    "disk": Growth(admit_after=2, evict_after_seconds=20, evict_below_count=4, max_bytes=8 * ROW_BYTES, spill=True),
}

some_ids = st.lists(st.sampled_from(IDS), unique=True, max_size=20)
steps = st.one_of(
    st.tuples(st.just("push"), some_ids, st.integers(-4, 4)),
    st.tuples(st.just("push"), some_ids, st.integers(-4, 4)),
    st.tuples(st.just("pass_time"), st.integers(1, 15)),
    st.tuples(st.just("evict")),
    st.tuples(st.just("remove"), some_ids),
    st.tuples(st.just("drop"), st.integers(1, 8)),
    st.tuples(st.just("put_rows"), some_ids, st.integers(-4, 4)),
    st.tuples(st.just("forget_evicted"), st.integers(0, 3)),
    st.tuples(st.just("move")),
)


@cache
def birth(id: int) -> tuple[float, ...]:
    return tuple(initial_rows(CONFIG, seed=0, first_row=id % 2**64, num_rows=1)[0].tolist())


def mix(number: int) -> int:
    """SplitMix64's finalizer, in whole numbers."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


@cache
def chance(id: int, pushes: int) -> float:
    hashed = mix(((id % 2**64 ^ random_stream(CONFIG, 0, -1)) + 0x9E3779B97F4A7C15) % 2**64)
    return (mix((hashed + pushes) % 2**64) >> 11) / 2**53


def bucket(id: int) -> int:
    numbers = np.empty(1, np.uint16)
    find_buckets(np.array([id]), SALT, numbers)
    return int(numbers[0])


class Plain:
    """The same table as dicts: of rows [weight, pushes, seen, version], of counts and of ids that went."""

    def __init__(self, growth: Growth) -> None:
        self.growth, self.version, self.now = growth, 0, 1000
        self.rows, self.counted, self.gone = {}, {}, {}

    def push(self, ids, value):
        self.version += 1
        for id in ids:
            pushes = 0
            if id not in self.rows:
                self.gone.pop(id, None)
                pushes = self.counted.pop(id, [0])[0]
                is_likely = chance(id, pushes + 1) < self.growth.admit_probability
                if pushes + 1 < self.growth.admit_after or not is_likely:
                    self.counted[id] = [pushes + 1, self.now, self.version]
                    continue
                self.rows[id] = [np.array(birth(id), np.float32), pushes, 0, 0]
            weight, pushes, _, _ = self.rows[id]
            self.rows[id] = [weight - np.float32(value), pushes + 1, self.now, self.version]
        most = (self.growth.max_bytes or 10**9) // ROW_BYTES
        if len(self.rows) > most and not self.growth.spill:
            oldest = sorted(self.rows, key=lambda id: (self.rows[id][3], id))
            self._evict(oldest[: len(self.rows) - most * 7 // 8])

    def pass_time(self, seconds):
        self.now += seconds

    def evict(self):
        limit, below = self.growth.evict_after_seconds, self.growth.evict_below_count or 10**9
        if limit is None:
            return
        if undated := [row for row in self.rows.values() if row[2] == 0]:
            self.version += 1
            for row in undated:
                row[2:] = [self.now, self.version]
        old = [id for id, row in self.rows.items() if self.now - row[2] >= limit and row[1] < below]
        forgotten = [id for id, count in self.counted.items() if self.now - count[1] >= limit]
        if old or forgotten:
            self.version += 1
            self._evict(old + forgotten)

    def remove(self, ids):
        if there := [id for id in ids if id in self.rows or id in self.counted]:
            self.version += 1
            self._evict(there)

    def drop(self, eighth):
        for held in (self.rows, self.counted, self.gone):
            for id in [id for id in held if bucket(id) % 8 == eighth % 8]:
                del held[id]

    def put_rows(self, ids, value):
        self.version += 1
        for id in ids:
            self.rows[id] = [np.full(DIM, value, np.float32), self.growth.admit_after, 0, self.version]
            self.counted.pop(id, None)
            self.gone.pop(id, None)

    def forget_evicted(self, ago):
        self.gone = {id: version for id, version in self.gone.items() if version >= self.version - ago}

    def move(self):
        self.gone = {}

    def _evict(self, ids):
        for id in ids:
            self.rows.pop(id, None)
            self.counted.pop(id, None)
            self.gone[id] = self.version


@pytest.fixture(scope="module")
def make_table(tmp_path_factory):
    folder, numbers = tmp_path_factory.mktemp("spill"), itertools.count()
    return lambda growth: HashedTable(
        CONFIG, seed=0, salt=SALT, growth=growth, spill_folder=folder / str(next(numbers))
    )


def do(make_table, table, plain, name, *arguments):
    """Does a step to a table; gives the table to go on with."""
    if name == "push":
        ids, value = arguments
        table.push(
            np.array(ids, np.int64), np.full((len(ids), DIM), value, np.float32), updates=1, now=float(plain.now)
        )
    elif name == "evict":
        table.evict(float(plain.now))
    elif name == "remove":
        table.remove(np.array(arguments[0], np.int64))
    elif name == "drop":
        table.drop(np.arange(4096) % 8 == arguments[0] % 8)
    elif name == "put_rows":
        table.put_rows(np.array(arguments[0], np.int64), np.full((len(arguments[0]), DIM), arguments[1]), {})
    elif name == "forget_evicted":
        table.forget_evicted(plain.version - arguments[0])
    elif name == "move":
        # An older state and what changed since: as a snapshot, and one more.
        other, since = make_table(table.growth), table.version // 2
        whole = table.take()
        other.put(whole)
        other.put(table.take(since=since))
        other.version = table.version
        table.close()
        return other
    return table


def check(table, plain):
    ids, records = table.take()
    ends = records[:, -4:].view(np.uint32)
    held = dict(zip(ids.tolist(), zip(records[:, :DIM], ends.tolist(), strict=True), strict=True))
    assert len(held) == ids.size
    assert held.keys() == plain.rows.keys() | plain.counted.keys()
    for id, (weight, pushes, seen, version) in plain.rows.items():
        assert held[id][1] == [pushes, seen, version, 0]
        assert np.array_equal(held[id][0], weight)
    for id, (pushes, seen, version) in plain.counted.items():
        assert held[id][1] == [pushes | 1 << 31, seen, version, 0]
        assert held[id][0].tolist() == list(birth(id))
    assert (table.num_rows, table.version) == (len(plain.rows), plain.version)
    assert sorted(table.evicted()) == sorted(plain.gone)
    since = plain.version // 2
    assert sorted(table.evicted(since=since)) == sorted(id for id, version in plain.gone.items() if version > since)
    changed = [id for held in (plain.rows, plain.counted) for id, row in held.items() if row[-1] > since]
    assert sorted(table.take(since=since).ids) == sorted(changed)
    pulled = np.empty((len(IDS), DIM), np.float32)
    table.pull(np.array(IDS), pulled)
    for id, row in zip(IDS, pulled, strict=True):
        assert row.tolist() == (plain.rows[id][0].tolist() if id in plain.rows else list(birth(id)))


@pytest.mark.parametrize("kind", GROWTHS)
@settings(deadline=None, max_examples=60)
@given(todo=st.lists(steps, max_size=25))
def test_holds_what_dicts_would(kind, make_table, todo):
    if GROWTHS[kind].spill and find_spec("rocksdict") is None:
        pytest.skip("rocksdict is not installed")
    table, plain = make_table(GROWTHS[kind]), Plain(GROWTHS[kind])
    for name, *arguments in todo:
        table = do(make_table, table, plain, name, *arguments)
        getattr(plain, name)(*arguments)
        check(table, plain)
    table.close()
