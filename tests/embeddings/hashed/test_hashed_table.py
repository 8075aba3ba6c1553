"""What a table on demand answers, copies and refuses; nothing that is refused leaves a trace."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings import RowAdam, RowSGD, TableConfig
from embeddings.hashed.hashed_table import HashedTable, Records
from embeddings.kernels.hash_kernels import find_buckets
from embeddings.tables import UNBOUNDED

SALT = np.uint64(11)
DIM = 6


def make_table(num_rows=1000, **settings):
    config = TableConfig(name="a", num_rows=num_rows, dim=DIM, init_scale=0.5, optimizer=RowAdam(learning_rate=0.1))
    return HashedTable(config, seed=2, salt=SALT, **settings)


def push(table, ids, *, value=1.0, updates=1, now=100.0):
    table.push(np.array(ids), np.full((len(ids), DIM), value, np.float32), updates=updates, now=now)


def pull(table, ids):
    rows = np.empty((len(ids), DIM), np.float32)
    table.pull(np.array(ids, np.int64), rows)
    return rows


def by_id(records):
    order = np.argsort(records.ids)
    return records.ids[order].tolist(), records.rows[order].view(np.uint32).tolist()


def test_any_number_of_64_bits_is_an_id_where_there_is_no_end():
    table, ids = make_table(UNBOUNDED), [0, -1, 2**63 - 1, -(2**63), 5]
    before = pull(table, ids)
    push(table, ids)
    assert table.num_rows == len(ids)
    assert (pull(table, ids) != before).all()
    assert sorted(table.take().ids) == sorted(ids)


def test_pulling_makes_no_rows():
    table = make_table()
    pull(table, [1, 2, 3, 2])
    assert (table.num_rows, table.version) == (0, 0)


@pytest.mark.parametrize("id", [-1, 1000])
def test_an_id_outside_is_refused_before_anything_changes(id):
    table = make_table()
    with pytest.raises(ValueError, match=rf"table 'a': expected ids in \[0, 1000\), got {id}"):
        push(table, [3, id])
    with pytest.raises(ValueError, match="expected ids in"):
        pull(table, [3, id])
    assert (table.num_rows, table.version) == (0, 0)


def test_pushes_that_do_not_fit_are_refused_before_anything_changes():
    table = make_table()
    with pytest.raises(ValueError, match="table 'a': expected each id once in a push, got 4 again"):
        push(table, [4, 7, 4])
    with pytest.raises(ValueError, match=r"expected gradients \(1, 6\), got \(1, 5\)"):
        table.push(np.array([1]), np.zeros((1, 5), np.float32), updates=1, now=0.0)
    with pytest.raises(ValueError, match="expected contiguous float32 or float16, got float64"):
        table.push(np.array([1]), np.zeros((1, DIM)), updates=1, now=0.0)
    with pytest.raises(ValueError, match="expected 1 counts, or none, got 2"):
        table.push(np.array([1]), np.zeros((1, DIM), np.float32), updates=1, now=0.0, counts=np.array([1, 1]))
    with pytest.raises(ValueError, match=r"expected records of float32 \(1, \d+\), got float32 \(1, 3\)"):
        table.put(Records(np.array([1]), np.zeros((1, 3), np.float32)))
    with pytest.raises(ValueError, match=r"expected room for rows \(1, 6\), got \(1, 5\)"):
        table.pull(np.array([1]), np.zeros((1, 5), np.float32))
    with pytest.raises(ValueError, match=r"expected ids \[n\] of int64, got int32 \(1,\)"):
        table.pull(np.array([1], np.int32), np.zeros((1, DIM), np.float32))
    assert (table.num_rows, table.version) == (0, 0)


def test_ids_and_gradients_may_be_read_only():
    table = make_table()
    ids = np.frombuffer(np.arange(3).tobytes(), np.int64)
    gradients = np.frombuffer(np.ones((3, DIM), np.float16).tobytes(), np.float16).reshape(3, DIM)
    table.push(ids, gradients, updates=1, now=0.0)
    assert table.num_rows == 3


def test_takes_what_changed_since_a_version_with_pushes_times_and_versions():
    table = make_table()
    push(table, [1, 2, 3], now=7.9)
    table.count_change()
    push(table, [2, 4], updates=2, now=9.0)
    assert table.version == 3
    ids, rows = table.take(since=1)
    assert sorted(ids) == [2, 4]
    ends = dict(zip(ids.tolist(), rows[:, -4:].view(np.uint32).tolist(), strict=True))
    assert ends == {2: [2, 9, 3, 0], 4: [1, 9, 3, 0]}
    assert table.take(since=3).ids.size == 0
    assert table.take(since=3).rows.shape == (0, table.record_width)


def test_what_is_put_elsewhere_is_the_same_and_learns_alike():
    table, other = make_table(), make_table()
    random = np.random.default_rng(0)
    for step in range(1, 10):
        push(table, random.permutation(1000)[:50], value=step, updates=step)
    saved = table.take(since=0)
    push(other, saved.ids[:3], value=9.0)  # what stood there before
    other.put(saved)
    assert by_id(saved) == by_id(other.take())
    assert other.version == table.version
    since = table.version
    for step in range(10, 15):
        some = random.permutation(1000)[:50]
        for each in (table, other):
            push(each, some, value=-step, updates=step)
    assert by_id(table.take(since=since)) == by_id(other.take(since=since))


def test_rows_from_elsewhere_may_be_stamped_with_a_version_of_here():
    table, other = make_table(), make_table()
    push(table, [1, 2])
    for step in range(5):
        push(other, [9], updates=step + 1)
    other.count_change()
    other.put(table.take(), version=other.version)
    assert sorted(other.take(since=5).ids) == [1, 2]
    assert other.version == 6
    assert by_id(table.take())[1] != by_id(other.take(since=5))[1]  # and table's own records are as they were
    assert table.take(since=1).ids.size == 0


def test_drops_buckets_and_takes_only_those_that_are_asked_for():
    table, ids = make_table(), np.arange(1000)
    push(table, ids)
    numbers, wanted = np.empty(1000, np.uint16), np.zeros(4096, np.bool_)
    find_buckets(ids, SALT, numbers)
    wanted[:2000] = True
    inside = ids[numbers < 2000]
    assert sorted(table.take(buckets=wanted).ids) == inside.tolist()
    assert sorted(table.list_ids(buckets=wanted)) == inside.tolist()
    assert table.list_ids(buckets=wanted, since=1).size == 0
    assert table.drop(wanted) == inside.size
    assert sorted(table.take().ids) == ids[numbers >= 2000].tolist()
    assert table.evicted().size == 0
    assert np.array_equal(pull(table, inside), pull(make_table(), inside))


def test_checkpoints_rows_and_states_come_back():
    table, other, ids = make_table(), make_table(), np.arange(20)
    for step in range(1, 4):
        push(table, ids[:15], value=step, updates=step)
    weight, state = table.read_rows(ids)
    assert np.array_equal(weight[15:], pull(make_table(), ids[15:]))
    assert {name: values.shape for name, values in state.items()} == dict.fromkeys(
        ["first_moment", "second_moment"], (20, DIM)
    )
    assert not state["first_moment"][15:].any()
    other.put_rows(ids, weight, state)
    assert (other.version, other.num_rows) == (1, 20)
    for each in (table, other):
        push(each, ids, updates=4)
    assert np.array_equal(pull(table, ids), pull(other, ids))


def test_rows_without_states_begin_with_none():
    config = TableConfig(name="a", num_rows=10, dim=3, optimizer=RowSGD(learning_rate=1.0))
    table = HashedTable(config, seed=0, salt=SALT)
    table.put_rows(np.array([4]), np.full((1, 3), 5, np.float32), {})
    table.push(np.array([4]), np.ones((1, 3), np.float32), updates=1, now=0.0)
    assert table.read_rows(np.array([4]))[0].tolist() == [[4, 4, 4]]


def test_removed_rows_are_listed_until_they_are_forgotten_or_back():
    table = make_table()
    push(table, [1, 2, 3])
    assert table.remove(np.array([2, 3, 77])) == 2
    assert table.version == 2
    assert sorted(table.evicted(since=1)) == [2, 3]
    assert table.evicted(since=2).size == 0
    assert np.array_equal(pull(table, [2]), pull(make_table(), [2]))
    push(table, [3])
    assert table.evicted().tolist() == [2]
    table.forget_evicted(2)
    assert table.evicted().tolist() == [2]
    table.forget_evicted(3)
    assert table.evicted().size == 0
    assert table.remove(np.array([55])) == 0
    assert table.version == 3
