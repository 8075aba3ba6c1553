"""A large shard's snapshots are many files, by bucket: whoever needs some buckets reads their files, and few others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from parameter_server.shard import folder as shard_folder
from parameter_server.shard import snapshots as shard_snapshots
from parameter_server.shard.shard import Shard

EVERYTHING = np.ones(4096, bool)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file has been read; parts are so small that all snapshots are many files."""
    monkeypatch.setattr(shard_folder, "PART_BYTES", 20_000)
    counts: Counter[Path] = Counter()
    load = shard_snapshots.load_file
    monkeypatch.setattr(shard_snapshots, "load_file", lambda path: (counts.update([path]), load(path))[1])
    return counts


def push_and_save(run, shard: Shard, clocks: range) -> None:
    for clock in clocks:
        ids = np.arange(500)
        gradients = np.random.default_rng(clock).integers(-8, 9, (500, 4)).astype(np.float32)
        run.push(shard, 0, clock, rows=(ids, gradients))
        run.push(shard, 1, clock, table=1, rows=(ids, gradients))
        shard.snapshot()


def test_a_merge_reads_each_file_a_few_times_however_many_there_are(run, reads, monkeypatch):
    monkeypatch.setattr(shard_folder, "INCREMENTS", 3)
    shard = run.start(durability="snapshot")
    push_and_save(run, shard, range(1, 4))
    assert not reads
    push_and_save(run, shard, range(4, 5))
    first, *_, ending = shard._guarded._folder._snapshots.chain[0].files
    assert (first.first_bucket, ending.first_bucket, ending.end_bucket) == (0, 0, 4096)
    groups = max(reads.values())  # of buckets, for each of which the endings are read
    assert groups > 20
    assert first.end_bucket == -(-4096 // groups)
    of_buckets = [count for count in reads.values() if count < groups]
    assert len(of_buckets) > 8
    assert max(of_buckets) < groups / 2
    before = run.pull(shard)
    shard.close()
    np.testing.assert_array_equal(run.pull(run.start()), before)


def test_a_shard_that_takes_over_some_buckets_reads_their_files(run, reads):
    shard = run.start(durability="snapshot")
    push_and_save(run, shard, range(1, 2))
    files = shard._guarded._folder._snapshots.chain[0].files
    partial = {file.name for file in files if file.end_bucket - file.first_bucket < 4096}
    before = run.pull(shard)
    shard.close()
    some = EVERYTHING.copy()
    some[512:] = False
    for name, buckets, expected in (("some", some, 1), ("none", ~EVERYTHING, 0), ("all", EVERYTHING, len(partial))):
        reads.clear()
        new = run.start(name=name)
        new.restore_from([run.folder / "shard-0"], buckets)
        assert new._state.orders.clocks == 2  # of both lanes, whatever was taken over
        assert sum(count for path, count in reads.items() if path.name in partial) == expected
    assert len(partial) > 2
    np.testing.assert_array_equal(run.pull(new), before)
