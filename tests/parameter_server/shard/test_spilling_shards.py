"""A shard whose rows go to disk keeps, moves and restores them all; what it spilled is no part of what it keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parameter_server.description import Growth
from parameter_server.shard import bucket_chunks
from parameter_server.shard import folder as shard_folder

ROOM = 50  # rows of table a in memory, of some 400
ROW_BYTES = 4 * (4 + 4 + 2)


@pytest.fixture
def spilling(run, monkeypatch):
    """A run of a table that spills; snapshots and moves take it in many groups of buckets."""
    pytest.importorskip("rocksdict")
    run.description = replace(run.description, growth={"a": Growth(max_bytes=ROOM * ROW_BYTES, spill=True)})
    monkeypatch.setattr(shard_folder, "PART_BYTES", 1500)
    monkeypatch.setattr(bucket_chunks, "PART_BYTES", 1500)
    return run


def push(run, shard, clocks, *, before=0):
    """Pushes, after so many that the shard has not seen."""
    for clock in clocks:
        run.push(shard, 0, clock, seq=clock - before)


def check(run, shard, clocks):
    np.testing.assert_array_equal(run.pull(shard), run.sums((0, clock) for clock in clocks))
    in_memory = len(shard._state.tables[0]._rows.memory)
    assert in_memory <= ROOM < shard.num_rows[0] // 2


@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_rows_on_disk_come_back_after_a_restart(spilling, durability):
    run = spilling
    shard = run.start(durability=durability)
    for first in range(1, 41, 10):
        push(run, shard, range(first, first + 10))
        shard.snapshot()
        check(run, shard, range(1, first + 10))
    if durability == "journal":
        push(run, shard, range(41, 46))
    rows, version = shard.num_rows, shard.versions
    shard.close()
    (run.folder / "shard-0" / "spill" / "0" / "CURRENT").write_bytes(b"garbage")  # nobody may read it again
    again = run.start()
    assert (again.num_rows, again.versions, again.counts.lost_pushes) == (rows, version, 0)
    check(run, again, range(1, 46 if durability == "journal" else 41))


def test_rows_on_disk_move_to_another_shard_and_number_of_shards(spilling):
    run, everything = spilling, np.ones(4096, np.bool_)
    shards = [run.start(n, (0,), durability="journal") for n in (0, 1)]
    push(run, shards[0], range(1, 31))
    versions = shards[0].versions
    shards[1].put_buckets(everything, list(shards[0].take_buckets(everything)), is_last=False)
    push(run, shards[0], range(31, 36))  # rows that were on disk in the first pass
    shards[0].freeze(everything)
    shards[1].put_buckets(everything, list(shards[0].take_buckets(everything, versions)), is_last=True)
    for shard in shards:
        run.route(shard, np.ones(4096, np.int32), 2)
    shards[0].drop_buckets(everything)
    assert shards[0].num_rows == [0, 0]
    push(run, shards[1], range(36, 41), before=35)
    check(run, shards[1], range(1, 41))
    for shard in shards:
        shard.close()
    merged = run.start(2, (2,), epoch=3, name="merged")
    merged.restore_from([run.folder / f"shard-{n}" for n in (0, 1)], everything)
    check(run, merged, range(1, 41))


def test_whoever_may_not_use_a_folder_leaves_its_rows_on_disk(spilling):
    run = spilling
    shard = run.start(durability="journal")
    push(run, shard, range(1, 21))
    spill = shard._state.tables[0]._rows._disk._folder
    before = sorted(spill.iterdir())
    with pytest.raises(ValueError, match="got one that another uses"):
        run.start()
    assert sorted(spill.iterdir()) == before
    push(run, shard, range(21, 41))
    check(run, shard, range(1, 41))
    shard.close()
    before = sorted(spill.iterdir())
    with pytest.raises(ValueError, match="expected the folder of run 7, shard 1"):
        run.start(1, name="shard-0")
    assert sorted(spill.iterdir()) == before
