"""Rows come and go as a table's growth says, and alike wherever the same is done again from what was saved."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings import RowSGD, TableConfig
from embeddings.hashed import admission, hashed_table
from embeddings.hashed.growth import Growth
from embeddings.hashed.hashed_table import HashedTable
from embeddings.tables import UNBOUNDED

DIM = 4
ROW_BYTES = 4 * (DIM + 4 + 2)


def make_table(growth, *, seed=0):
    config = TableConfig(name="a", num_rows=UNBOUNDED, dim=DIM, init_scale=0.5, optimizer=RowSGD(learning_rate=1.0))
    return HashedTable(config, seed=seed, salt=np.uint64(1), growth=growth)


def push(table, ids, *, now=1000.0):
    table.push(np.array(ids), np.ones((len(ids), DIM), np.float32), updates=1, now=now)


def pushes_seen(table, ids):
    """Counts pushes that a row has learned from: each has moved it by 1."""
    rows, born = np.empty((len(ids), DIM), np.float32), np.empty((len(ids), DIM), np.float32)
    table.pull(np.array(ids), rows)
    make_table(Growth()).pull(np.array(ids), born)
    return np.rint(born - rows)[:, 0].astype(int).tolist()


def assert_same(one, other):
    records = [table.take() for table in (one, other)]
    orders = [np.argsort(each.ids) for each in records]
    assert np.array_equal(*(each.ids[order] for each, order in zip(records, orders, strict=True)))
    assert np.array_equal(*(each.rows[order].view(np.uint32) for each, order in zip(records, orders, strict=True)))
    assert sorted(one.evicted()) == sorted(other.evicted())
    assert (one.version, one.num_rows) == (other.version, other.num_rows)


def copy_of(table):
    other = make_table(table.growth)
    other.put(table.take())
    other.version = table.version
    return other


def test_a_row_is_kept_from_its_third_push_on():
    table = make_table(Growth(admit_after=3))
    push(table, [1, 2, 3])
    push(table, [1, 2])
    assert (table.num_rows, pushes_seen(table, [1, 2, 3])) == (0, [0, 0, 0])
    push(table, [1, 3, 9])
    assert (table.num_rows, pushes_seen(table, [1, 2, 3])) == (1, [1, 0, 0])
    push(table, [1, 3])
    assert (table.num_rows, pushes_seen(table, [1, 2, 3])) == (2, [2, 0, 1])
    counts = {int(id): row[-4:].view(np.uint32)[0] for id, row in zip(*table.take(), strict=True)}
    counted = 1 << 31
    assert counts == {1: 4, 3: 3, 2: counted | 2, 9: counted | 1}


def test_what_is_counted_is_saved_and_reads_as_it_would_be_born():
    table = make_table(Growth(admit_after=3))
    push(table, [1, 2])
    push(table, [1])
    other = copy_of(table)
    assert_same(table, other)
    ids, rows = table.take()
    born, _ = make_table(Growth()).read_rows(ids)
    assert np.array_equal(rows[:, :DIM], born)
    for each in (table, other):
        push(each, [1, 2])
    assert table.num_rows == 1
    assert_same(table, other)
    assert sorted(table.take(since=2).ids) == [1, 2]


def test_an_earlier_state_may_be_written_over_a_later_one():
    table = make_table(Growth(admit_after=2))
    push(table, [1, 2])
    early = table.take()
    push(table, [1])
    late = table.take()
    table.put(early)
    assert table.num_rows == 0
    table.put(late)
    assert table.num_rows == 1
    assert table.take().ids.size == 2


def test_admission_by_chance_is_a_function_of_seed_id_and_count():
    table, twin, other = (make_table(Growth(admit_probability=0.25), seed=seed) for seed in (0, 0, 1))
    ids = np.arange(4000)
    for each in (table, other):
        push(each, ids)
    for some in np.split(ids, 4):
        push(twin, some)
    assert 900 < table.num_rows < 1100
    assert sorted(twin.take().ids) == sorted(table.take().ids)
    kept = [set(np.flatnonzero(pushes_seen(each, ids))) for each in (table, twin, other)]
    assert kept[0] == kept[1] != kept[2]
    push(table, ids)
    assert 1600 < table.num_rows < 1900  # 4,000 * (1 - 0.75 ** 2) = 1,750


def test_no_more_than_so_many_are_counted(monkeypatch):
    monkeypatch.setattr(hashed_table, "Admission", lambda *a, **s: admission.Admission(*a, **s, most_counted=100))
    table = make_table(Growth(admit_after=2))
    push(table, range(60))
    push(table, range(100, 140))
    push(table, [7, 500])  # 7 is admitted
    assert table.take().ids.size == 101
    other = copy_of(table)
    for each in (table, other):
        push(each, [501, 502])
    # of 102 that were counted the last 75 are, and one is a row
    assert sorted(table.take().ids) == [7, *range(28, 60), *range(100, 140), 500, 501, 502]
    assert sorted(table.evicted(since=3)) == [id for id in range(28) if id != 7]
    assert_same(table, other)


def test_rows_that_nobody_pushes_go():
    table = make_table(Growth(evict_after_seconds=50))
    push(table, [1, 2, 3], now=1000)
    push(table, [2], now=1030)
    assert table.evict(1049) == 0
    assert table.version == 2
    assert table.evict(1050) == 2
    assert (table.num_rows, table.version, table.num_evicted) == (1, 3, 2)
    assert sorted(table.evicted(since=2)) == [1, 3]
    assert pushes_seen(table, [1, 2, 3]) == [0, 2, 0]
    push(table, [3], now=1060)
    assert table.evicted().tolist() == [1]


def test_rows_with_enough_pushes_stay():
    table = make_table(Growth(evict_after_seconds=50, evict_below_count=2))
    push(table, [1, 2])
    push(table, [2])
    assert table.evict(2000) == 1
    assert table.take().ids.tolist() == [2]


def test_nothing_goes_where_growth_does_not_say_so():
    table = make_table(Growth())
    push(table, [1, 2])
    assert table.evict(1e9) == 0
    assert table.num_rows == 2


def test_what_is_counted_is_forgotten_in_time():
    table = make_table(Growth(admit_after=2, evict_after_seconds=50))
    push(table, [1, 2])
    push(table, [2], now=1040)
    assert table.evict(1060) == 0
    assert sorted(table.evicted(since=2)) == [1]
    push(table, [1], now=1061)
    assert table.num_rows == 1
    assert table.evicted().size == 0


def test_rows_of_a_checkpoint_are_as_if_pushed_when_they_are_first_looked_at():
    table = make_table(Growth(evict_after_seconds=50))
    table.put_rows(np.array([1, 2]), np.ones((2, DIM), np.float32), {})
    assert table.evict(5000) == 0
    assert sorted(table.take(since=1).ids) == [1, 2]  # so that the time is saved
    push(table, [2], now=5020)
    assert table.evict(5050) == 1
    assert table.take().ids.tolist() == [2]


def test_the_least_recently_pushed_rows_go_where_there_is_no_room():
    table = make_table(Growth(max_bytes=80 * ROW_BYTES))
    push(table, range(40))
    push(table, range(100, 140))
    push(table, range(20))
    assert table.num_rows == 80
    push(table, [500])
    # down to 70: those of the first push that were not pushed again, by their ids
    assert table.num_rows == 70
    assert sorted(table.evicted(since=3)) == [*range(20, 31)]
    other = copy_of(table)
    for each in (table, other):
        push(each, range(200, 211))
    assert_same_rows_since(table, other, since=4)
    assert table.num_rows == 70


def assert_same_rows_since(one, other, *, since):
    assert sorted(one.take().ids) == sorted(other.take().ids)
    assert sorted(one.evicted(since=since)) == sorted(other.evicted(since=since))


def test_less_room_than_for_one_row_is_refused():
    with pytest.raises(ValueError, match=f"max_bytes: expected at least those of a row, {ROW_BYTES}, got 8"):
        make_table(Growth(max_bytes=8))


def test_a_number_of_pushes_without_a_time_is_refused():
    with pytest.raises(ValueError, match=r"evict_below_count: expected evict_after_seconds beside it, .* got none"):
        Growth(evict_below_count=2)
