"""Rows that went to disk are rows like others: they read, learn, are saved, move and go as those in memory do."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from embeddings import RowAdagrad, TableConfig
from embeddings.hashed import spilled_rows
from embeddings.hashed.growth import Growth
from embeddings.hashed.hashed_table import HashedTable
from embeddings.kernels.hash_kernels import find_buckets
from embeddings.tables import UNBOUNDED

pytest.importorskip("rocksdict")
DIM = 5
ROW_BYTES = 4 * (2 * DIM + 4 + 2)
SPILL = Growth(max_bytes=64 * ROW_BYTES, spill=True, evict_after_seconds=100)
CONFIG = TableConfig(name="a", num_rows=UNBOUNDED, dim=DIM, init_scale=1.0, optimizer=RowAdagrad(learning_rate=0.1))
SALT = np.uint64(7)


@pytest.fixture
def spilling(tmp_path):
    table = HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL, spill_folder=tmp_path / "spill" / "0")
    yield table
    table.close()


@pytest.fixture
def keeping():
    return HashedTable(CONFIG, seed=0, salt=SALT, growth=Growth(evict_after_seconds=100))


def records_of(table, **which):
    ids, rows = table.take(**which)
    order = np.argsort(ids)
    return ids[order].tolist(), rows[order].view(np.uint32).tolist()


def buckets_by_id(ids):
    numbers = np.empty(ids.size, np.uint16)
    find_buckets(ids, SALT, numbers)
    return numbers


def assert_same(one, other, ids):
    assert records_of(one) == records_of(other)
    assert (one.num_rows, one.version, sorted(one.evicted())) == (
        other.num_rows,
        other.version,
        sorted(other.evicted()),
    )
    for dtype in (np.float32, np.float16):
        read = [np.empty((ids.size, DIM), dtype) for _ in range(2)]
        one.pull(ids, read[0])
        other.pull(ids, read[1])
        assert np.array_equal(*read)
    for left, right in zip(one.read_rows(ids), other.read_rows(ids), strict=True):
        assert str(left) == str(right)


def test_a_table_that_spills_is_as_one_that_does_not(spilling, keeping):
    random, ids = np.random.default_rng(0), np.array([*range(-150, 150), 2**63 - 1, -(2**63)])
    spilled = 0
    for step in range(1, 40):
        some = random.choice(ids, random.integers(1, 60), replace=False)
        gradients = random.normal(size=(some.size, DIM)).astype(np.float32)
        buckets = random.random(4096) < 0.02
        for table in (spilling, keeping):
            table.push(some, gradients, updates=step, now=1000.0 + 10 * step)
            if step % 5 == 0:
                table.evict(1000.0 + 10 * step)
            if step % 7 == 0:
                table.drop(buckets)
            if step % 11 == 0:
                table.remove(some[:5])
            if step % 13 == 0:
                table.put_rows(some[5:9], gradients[5:9], {})
        if step % 4 == 0:
            assert_same(spilling, keeping, ids)
            assert records_of(spilling, since=step - 3) == records_of(keeping, since=step - 3)
            assert records_of(spilling, buckets=buckets) == records_of(keeping, buckets=buckets)
        spilled = max(spilled, spilling.num_rows - len(spilling._rows.memory))
        assert len(spilling._rows.memory) <= 64
    assert spilled > 50


def test_what_was_taken_fits_where_there_is_less_memory(spilling, keeping):
    ids = np.arange(500)
    keeping.push(ids, np.ones((500, DIM), np.float32), updates=1, now=5.0)
    spilling.put(keeping.take())
    assert len(spilling._rows.memory) <= 64
    assert_same(spilling, keeping, ids)
    spilling.put(keeping.take())
    assert_same(spilling, keeping, ids)


def test_rows_of_a_checkpoint_grow_old_on_disk_too(spilling, keeping):
    ids = np.arange(200)
    for table in (spilling, keeping):
        table.put_rows(ids, np.ones((200, DIM), np.float32), {})
        assert table.evict(1000.0) == 0
    assert_same(spilling, keeping, ids)
    for table in (spilling, keeping):
        assert table.evict(1100.0) == 200
    assert_same(spilling, keeping, ids)


def test_rows_on_disk_are_dated_there(spilling, keeping, monkeypatch):
    ids = np.arange(2000)
    for table in (spilling, keeping):
        table.put_rows(ids, np.ones((2000, DIM), np.float32), {})
    monkeypatch.setattr(spilled_rows, "_CHUNK", 16)
    with monkeypatch.context() as patch:
        patch.setattr(spilling._rows.memory, "insert", lambda ids: pytest.fail(f"{ids.size} rows were brought back"))
        for table in (spilling, keeping):
            assert table.evict(1000.0) == 0
    assert_same(spilling, keeping, ids)
    for table in (spilling, keeping):
        table.push(ids[500:600], np.ones((100, DIM), np.float32), updates=1, now=1050.0)
        assert table.evict(1100.0) == 1900
    assert_same(spilling, keeping, ids)


def test_only_the_buckets_that_are_asked_for_are_read(spilling):
    ids = np.arange(3000)
    spilling.push(ids, np.ones((3000, DIM), np.float32), updates=1, now=5.0)
    numbers = buckets_by_id(ids)
    spilled = set(spilling.take().ids.tolist()) - set(spilling._rows.memory.list_ids().tolist())
    assert len(spilled) > 2900
    for first, last in ((0, 4096), (0, 1), (17, 900), (4000, 4096), (5, 5)):
        mask = np.zeros(4096, np.bool_)
        mask[first:last] = True
        mask[first // 2] = first > 0  # and one apart
        found = [id for some, _ in spilling._rows._disk.scan(mask) for id in some.tolist()]
        assert sorted(found) == [id for id in ids[mask[numbers]].tolist() if id in spilled]
        assert sorted(spilling.list_ids(buckets=mask)) == sorted(spilling.take(buckets=mask).ids)


def test_disk_is_not_read_for_rows_that_cannot_be_there(spilling, monkeypatch):
    spilling.push(np.arange(300), np.ones((300, DIM), np.float32), updates=1, now=1000.0)
    version = spilling.version
    spilling.push(np.arange(290, 300), np.ones((10, DIM), np.float32), updates=2, now=1050.0)
    monkeypatch.setattr(spilling._rows._disk, "scan", lambda *_: pytest.fail("all of it is read"))
    assert spilling.evict(1090.0) == 0
    assert sorted(spilling.take(since=version).ids) == list(range(290, 300))
    monkeypatch.undo()
    assert spilling.evict(1101.0) == 290
    assert spilling.num_rows == 10


def test_a_folder_is_emptied_first(tmp_path):
    for _ in range(2):
        table = HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL, spill_folder=tmp_path)
        assert (table.num_rows, table.take().ids.size) == (0, 0)
        table.push(np.arange(300), np.ones((300, DIM), np.float32), updates=1, now=5.0)
        assert table.num_rows == 300
        table.close()


def test_a_folder_that_cannot_be_used_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "0"):
        with pytest.raises(OSError, match="file") as error:
            HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL, spill_folder=folder)
        assert "\n" not in str(error.value)
    table = HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL, spill_folder=tmp_path / "spill")
    table.push(np.arange(300), np.ones((300, DIM), np.float32), updates=1, now=5.0)
    table.close()
    for ids in (np.arange(300), np.arange(1000, 1300)):
        with pytest.raises(OSError, match=str(tmp_path / "spill")):
            table.push(ids, np.ones((300, DIM), np.float32), updates=1, now=5.0)


def test_nowhere_to_spill_to_is_refused():
    with pytest.raises(ValueError, match="spill: expected a folder for rows beyond max_bytes, got none"):
        HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(ValueError, match=r"rocksdict is not installed; run: pip install 'recforge\[spill\]'"):
        HashedTable(CONFIG, seed=0, salt=SALT, growth=SPILL, spill_folder=tmp_path / "spill")
