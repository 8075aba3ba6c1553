"""A disk that takes no more stops a shard, loudly; what had been acknowledged is there when there is room again."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress

import numpy as np
import pytest

from parameter_server.errors import Refusal, RefusedError


@pytest.mark.parametrize("call", ["writev", "fdatasync"])
def test_a_full_disk_stops_the_shard_and_what_was_acknowledged_is_there(run, monkeypatch, call):
    shard = run.start(durability="journal")
    run.push(shard, 0, 1)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = "os.writev" if call == "writev" else "parameter_server.shard.journal._sync_data"
    with monkeypatch.context() as broken:
        broken.setattr(target, fail)
        with pytest.raises(RefusedError, match="No space left on device") as caught:
            run.push(shard, 0, 2)
    assert caught.value.refusal == Refusal.DATA_LOSS
    assert "No space left" in shard.failed
    for refused in (lambda: run.push(shard, 0, 2), lambda: run.pull(shard), shard.snapshot):
        with pytest.raises(RefusedError) as caught:
            refused()
        assert caught.value.refusal == Refusal.DATA_LOSS
    shard.close()
    again = run.start()
    assert again.counts.lost_pushes == 0
    assert run.push(again, 0, 2) is (call == "writev")  # written but not synced: nobody was told, and it is there
    np.testing.assert_array_equal(run.pull(again), run.sums([(0, 1), (0, 2)]))


def test_a_file_that_may_not_grow_stops_the_shard(run):
    """A write cut short by the operating system, as a full disk does it."""
    shard = run.start(durability="journal")
    run.push(shard, 0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (segment,) = (run.folder / "shard-0" / "journal").iterdir()
    clock = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (segment.stat().st_size + 2000, hard))
    try:
        with suppress(RefusedError):
            for clock in range(2, 20):
                run.push(shard, 0, clock)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in shard.failed
    shard.close()
    again = run.start()
    assert again.counts.torn_bytes > 0
    np.testing.assert_array_equal(run.pull(again), run.sums((0, c) for c in range(1, clock)))
    assert run.push(again, 0, clock)


def test_a_snapshot_that_cannot_be_written_stops_the_shard_and_the_one_before_stays(run, monkeypatch):
    shard = run.start(durability="snapshot")
    run.push(shard, 0, 1)
    shard.snapshot()
    run.push(shard, 0, 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(RefusedError, match="Input/output error"):
            shard.snapshot()
    with pytest.raises(RefusedError):
        run.push(shard, 0, 3)
    shard.close()
    again = run.start()
    assert again.counts.lost_pushes == 1
    np.testing.assert_array_equal(run.pull(again), run.sums([(0, 1)]))
