"""Buckets move between shards while pushes go on, and between numbers of shards: nothing is lost or applied twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embeddings.row_optimizers import RowAdam
from embeddings.tables import TableConfig
from parameter_server.dense_codec import PIECE, PIECE_SALT, Combine
from parameter_server.errors import RefusedError
from parameter_server.partition import buckets_of, salt_of, spread_evenly
from parameter_server.shard import bucket_chunks
from parameter_server.shard.shard import Shard
from parameter_server.shard.state_parts import pack_part, unpack_part
from parameter_server.wire import Flag, Header, Op, decode, encode, join


def push_split(run, shards: dict[int, Shard], owners: np.ndarray, lane: int, clock: int, **head) -> None:
    """Pushes a clock's rows, each to the shard that owns it."""
    ids, gradients = head.pop("rows", None) or run.rows(lane, clock)
    owner = owners[buckets_of(ids, salt_of("a"))]
    for number in np.unique(owner).tolist():
        mine = owner == number
        run.push(shards[number], lane, clock, rows=(ids[mine], gradients[mine]), **head)


def pull_split(run, shards: dict[int, Shard], owners: np.ndarray) -> np.ndarray:
    ids = np.arange(500)
    owner = owners[buckets_of(ids, salt_of("a"))]
    table = np.empty((500, 4), np.float32)
    for number, shard in shards.items():
        table[owner == number] = run.pull(shard, ids=ids[owner == number])
    return table


def pass_buckets(moving: np.ndarray, source: Shard, target: Shard, since=(), *, is_last: bool = False) -> list[int]:
    versions = source.versions
    chunks = list(source.take_buckets(moving, since))
    assert max(map(len, chunks)) <= 4 << 20
    target.put_buckets(moving, chunks, is_last=is_last)
    return versions


@pytest.mark.parametrize("durability", ["none", "journal", "snapshot"])
def test_buckets_move_while_pushes_go_on(run, durability, monkeypatch):
    monkeypatch.setattr(bucket_chunks, "PART_BYTES", 2000)
    monkeypatch.setattr(bucket_chunks, "CHUNK_BYTES", 1000)
    owners = spread_evenly([0, 1])
    shards = {n: run.start(n, (0, 1), durability=durability) for n in (0, 1)}
    for clock in range(1, 6):
        push_split(run, shards, owners, 0, clock)
    moving = owners == 0
    moving[:1000] = False
    versions = pass_buckets(moving, shards[0], shards[1])
    for clock in range(6, 9):
        push_split(run, shards, owners, 0, clock)
    shards[0].freeze(moving)
    ids, gradients = run.rows(0, 9)
    frozen = moving[buckets_of(ids, salt_of("a"))]
    with pytest.raises(RefusedError, match="about to move"):
        run.push(shards[0], 0, 9, rows=(ids[frozen], gradients[frozen]))
    pass_buckets(moving, shards[0], shards[1], versions, is_last=True)
    if durability == "snapshot":
        shards[1].snapshot()
    with pytest.raises(RefusedError, match="expected buckets that routes place elsewhere"):
        shards[0].drop_buckets(moving)
    moved = np.where(moving, 1, owners).astype(np.int32)
    for shard in shards.values():
        run.route(shard, moved, 2)
    shards[0].drop_buckets(moving)
    for clock in range(9, 12):
        push_split(run, shards, moved, 0, clock)
    for clock in range(1, 9):  # another trainer computes the chunk again: marks have moved along
        push_split(run, shards, moved, 0, clock, lease=2, seq=clock)
    expected = run.sums((0, clock) for clock in range(1, 12))
    np.testing.assert_array_equal(pull_split(run, shards, moved), expected)
    if durability == "none":
        return
    for number, shard in shards.items():
        if durability == "snapshot":
            shard.snapshot()
        shard.close()
        shards[number] = run.start(number, (0, 1))
        run.route(shards[number], moved, 2)
        assert shards[number].counts.lost_pushes == 0
    np.testing.assert_array_equal(pull_split(run, shards, moved), expected)


def test_a_second_pass_takes_what_was_evicted_since_the_first(run):
    from parameter_server.description import Growth

    run.description = replace(run.description, growth={"a": Growth(evict_after_seconds=100.0)})
    shards = [run.start(n, durability="snapshot") for n in (0, 1)]
    everything = np.ones(4096, bool)
    run.push(shards[0], 0, 1)
    versions = pass_buckets(everything, shards[0], shards[1])
    shards[1].snapshot()
    assert shards[1].num_rows[0] > 0
    shards[0].evict(now=4e9)
    pass_buckets(everything, shards[0], shards[1], versions, is_last=True)
    assert shards[1].num_rows == [0, 0]
    shards[1].snapshot()
    shards[1].close()
    assert run.start(1).num_rows == [0, 0]


def test_dropped_buckets_do_not_come_back_with_a_snapshot(run):
    shard = run.start(durability="snapshot")
    run.push(shard, 0, 1)
    shard.snapshot()
    half = spread_evenly([0, 1])
    run.route(shard, half, 2)
    shard.drop_buckets(half == 1)
    left = shard.num_rows
    shard.snapshot()
    shard.close()
    again = run.start()
    assert again.num_rows == left
    assert 0 < left[0] < len(run.rows(0, 1)[0])


def test_a_damaged_chunk_is_refused_before_anything_of_it_is_taken(run):
    shards = [run.start(n) for n in (0, 1)]
    run.push(shards[0], 0, 1)
    everything = np.ones(4096, bool)
    (chunk, *_) = shards[0].take_buckets(everything)
    wrong = bytearray(chunk)
    wrong[-1] ^= 1
    with pytest.raises(RefusedError, match="got a damaged one"):
        shards[1].put_buckets(everything, [bytes(wrong)], is_last=True)
    shards[1].put_buckets(everything, [chunk], is_last=False)
    before = shards[1].num_rows
    for part in (
        {"0.ids": np.arange(3)},
        {"0.ids": np.arange(3), "0.records": np.zeros((3, 5), np.float32)},
        {
            "0.ids": np.arange(3),
            "0.records": np.zeros((2, shards[1]._guarded.state.tables[0].record_width), np.float32),
        },
        {"lanes": np.zeros(1, np.int64), "buckets": np.array([4096]), "marks": np.zeros((1, 1), np.int64)},
        {"lanes": np.zeros(2, np.int64), "buckets": np.array([1]), "marks": np.zeros((1, 1), np.int64)},
        {"dense.pieces": np.zeros(1, np.int64)},
        {"orders": np.zeros((1, 5), np.int64)},
        {"2.ids": np.arange(3)},
    ):
        with pytest.raises(RefusedError, match="expected a part of these tables"):
            shards[1].put_buckets(everything, [pack_part(part)], is_last=True)
    assert shards[1].num_rows == before
    assert shards[1].failed is None


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_a_run_goes_on_with_other_numbers_of_shards(run, durability):
    tables = tuple(TableConfig(name=n, num_rows=500, dim=4, optimizer=RowAdam(learning_rate=0.01)) for n in ("a", "b"))
    run.description = replace(run.description, tables=tables, durability=durability)
    reference = Shard(replace(run.description, durability="none"), 0)
    run.shards.append(reference)
    run.route(reference, np.zeros(4096, np.int32), 1)
    clock = 0
    folders: list[str] = []
    for generation, count in enumerate((2, 3, 1)):
        owners = spread_evenly(range(count))
        names = [f"{generation}-{n}" for n in range(count)]
        shards = {n: run.start(n, range(count), name=names[n], epoch=generation + 1) for n in range(count)}
        for number, shard in shards.items():
            if generation:
                info = shard.restore_from([run.folder / name for name in folders], owners == number)
                assert (info.lost, info.lines) == (0, ())
        if generation:
            assert_equal_to(reference, pull_split(run, shards, owners), run)
            for old in range(1, clock + 1):  # what was pushed long ago is known
                push_split(run, shards, owners, 0, old, lease=2 * generation, seq=old, rows=noise(old))
            assert_equal_to(reference, pull_split(run, shards, owners), run)
        for seq in range(1, 5):
            clock += 1
            run.push(reference, 0, clock, rows=noise(clock))
            push_split(run, shards, owners, 0, clock, lease=2 * generation + 1, seq=seq, rows=noise(clock))
            if clock % 2 == 0 and durability == "snapshot":
                [shard.snapshot() for shard in shards.values()]
        for shard in shards.values():
            shard.close()
        folders = names


def noise(clock: int) -> tuple[np.ndarray, np.ndarray]:
    """Many rows, so that each shard has some in each clock."""
    random = np.random.default_rng(clock)
    ids = np.unique(random.integers(0, 500, 100))
    return ids, random.normal(size=(len(ids), 4)).astype(np.float32)


def assert_equal_to(reference: Shard, rows: np.ndarray, run) -> None:
    np.testing.assert_array_equal(rows, run.pull(reference))


def test_buckets_are_taken_from_the_shard_that_held_them_last(run):
    """A move whose drop came after the snapshot: both folders tell of the buckets, one of them of older rows."""
    shards = {n: run.start(n, (0, 0), durability="snapshot") for n in (0, 1)}
    run.push(shards[0], 0, 1)
    everything = np.ones(4096, bool)
    pass_buckets(everything, shards[0], shards[1], is_last=True)
    for shard in shards.values():
        run.route(shard, np.ones(4096, np.int32), 2)
        shard.snapshot()
    run.push(shards[1], 0, 2, seq=1)
    shards[1].snapshot()
    for shard in shards.values():
        shard.close()
    for order in (("shard-0", "shard-1"), ("shard-1", "shard-0")):
        new = run.start(0, name=f"new-{order[0]}")
        new.restore_from([run.folder / name for name in order], everything)
        np.testing.assert_array_equal(run.pull(new), run.sums([(0, 1), (0, 2)]))
        with pytest.raises(ValueError, match="expected one without rows"):
            new.restore_from([run.folder / name for name in order], everything)


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_a_copy_for_a_move_that_was_given_up_is_not_what_is_restored(run, durability):
    """The receiver had kept its copy when the move failed, and all were killed before it heard of that."""
    shards = {n: run.start(n, (0, 0), durability=durability) for n in (0, 1)}
    run.push(shards[0], 0, 1)
    everything = np.ones(4096, bool)
    pass_buckets(everything, shards[0], shards[1], is_last=True)
    if durability == "snapshot":
        shards[1].snapshot()
    run.push(shards[0], 0, 2)
    if durability == "snapshot":
        shards[0].snapshot()
    for shard in shards.values():
        shard.close()
    new = run.start(0, name="new")
    new.restore_from([run.folder / "shard-0", run.folder / "shard-1"], everything)
    np.testing.assert_array_equal(run.pull(new), run.sums([(0, 1), (0, 2)]))


def test_a_copy_is_restored_where_there_is_nothing_else(run):
    shards = [run.start(n, (0, 0), durability="snapshot") for n in (0, 1)]
    run.push(shards[0], 0, 1)
    everything = np.ones(4096, bool)
    pass_buckets(everything, shards[0], shards[1], is_last=True)
    shards[1].snapshot()
    run.route(shards[0], np.ones(4096, np.int32), 2)  # the receiver is killed before it knows of them
    shards[0].drop_buckets(everything)
    shards[0].snapshot()
    for shard in shards:
        shard.close()
    new = run.start(0, name="new")
    new.restore_from([run.folder / "shard-0", run.folder / "shard-1"], everything)
    np.testing.assert_array_equal(run.pull(new), run.sums([(0, 1)]))


def test_ids_of_evicted_rows_are_not_kept_for_ever_where_nothing_is_saved(run):
    from parameter_server.description import Growth

    run.description = replace(run.description, growth={"a": Growth(evict_after_seconds=100.0)})
    shard = run.start()
    run.push(shard, 0, 1)
    (table, _) = shard._state.tables
    now = 4e9
    assert shard.evict(now) == len(run.rows(0, 1)[0])
    known = [table.evicted().size]
    for _ in range(30):
        now += 30.0
        table.count_change()  # as other pushes would
        shard.evict(now)
        known.append(table.evicted().size)
    assert known[0] == known[19] > 0  # for ten minutes
    assert known[-1] == 0
    assert table.evictions_since > 0  # so that readers who come back later are told to read all anew
    assert len(shard._guarded._versions_at) <= 11


def take_dense_part(shard: Shard) -> dict[str, np.ndarray]:
    parts = [unpack_part(chunk) for chunk in shard.take_buckets(np.ones(4096, bool))]
    return next(part for part in parts if "dense.pieces" in part and part["dense.pieces"].size)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dense.master", lambda array: np.full_like(array, np.nan)),
        ("dense.master", lambda array: array[:-1]),
        ("dense.master", lambda array: array.view(np.int32).astype(np.int64)),
        ("dense.numbers", lambda array: np.zeros_like(array)),
        ("dense.numbers", lambda array: np.repeat(array, 2)),
        ("dense.pieces", lambda array: array - 10),
        ("dense.pieces", lambda array: np.zeros_like(array)),
        ("dense.marks", lambda array: array + np.array([1000, 0, 0, 0])),
        ("dense.marks", lambda array: array + np.array([0, 5000, 0, 0])),
        ("dense.marks", lambda array: array - np.array([0, 0, 0, 50])),
    ],
)
def test_wrong_pieces_of_the_dense_part_are_refused_whole(run, name, change):
    shards = [run.start(n, (0, 0)) for n in (0, 1)]
    exchange(run, shards[0], 0, Combine.SET_IF_ABSENT, 1.0)
    exchange(run, shards[0], 1, Combine.EASGD, 3.0)
    part = take_dense_part(shards[0])
    everything = np.ones(4096, bool)
    with pytest.raises(RefusedError, match="expected a part of these tables"):
        shards[1].put_buckets(everything, [pack_part(part | {name: change(part[name])})], is_last=False)
    assert shards[1].failed is None
    shards[1].put_buckets(everything, [pack_part(part)], is_last=False)
    np.testing.assert_array_equal(take_dense_part(shards[1])["dense.master"], part["dense.master"])


def exchange(run, shard: Shard, clock: int, combine: Combine, values: float | None) -> tuple[int, np.ndarray]:
    pieces = np.arange(6)
    header = Header(Op.DENSE, run_id=7, lane=9, lease=1, clock=clock, codec=combine, version=6 * PIECE, factor=0.5)
    given = None if values is None else np.full((6, PIECE), values, np.float32)
    (answer,) = decode(b"".join(shard.push_pull_dense(join([encode(header, pieces, given)]))))
    return answer.header.flags, answer.values[:, 0]


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_pieces_of_the_dense_part_are_kept_and_move(run, durability, monkeypatch):
    monkeypatch.setattr(bucket_chunks, "CHUNK_BYTES", 2 * PIECE * 4)
    shard = run.start(durability=durability)
    exchange(run, shard, 0, Combine.SET_IF_ABSENT, 1.0)
    answer = exchange(run, shard, 1, Combine.EASGD, 3.0)
    np.testing.assert_array_equal(answer[1], np.full(6, 1.0, np.float32))
    if durability == "snapshot":
        shard.snapshot()
    shard.close()
    shard = run.start()
    np.testing.assert_array_equal(exchange(run, shard, 0, Combine.READ, None)[1], np.full(6, 2.0, np.float32))
    other = run.start(1)
    everything = np.ones(4096, bool)
    pass_buckets(everything, shard, other, is_last=True)
    run.route(other, np.ones(4096, np.int32), 2)
    flags, again = exchange(run, other, 1, Combine.EASGD, 3.0)
    assert flags & Flag.DUPLICATE
    np.testing.assert_array_equal(again, answer[1])
    np.testing.assert_array_equal(exchange(run, other, 0, Combine.READ, None)[1], np.full(6, 2.0, np.float32))
    frozen = np.zeros(4096, bool)
    frozen[buckets_of(np.array([3]), PIECE_SALT)] = True
    other.freeze(frozen)
    exchange(run, other, 0, Combine.READ, None)
    with pytest.raises(RefusedError, match="about to move"):
        exchange(run, other, 2, Combine.EASGD, 3.0)
    run.route(other, np.where(frozen, 0, 1).astype(np.int32), 3)
    with pytest.raises(RefusedError, match="moved"):
        exchange(run, other, 0, Combine.READ, None)
