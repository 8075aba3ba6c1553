"""What goes by age has gone after a restart too, also where no row went at that moment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from parameter_server.description import Growth

DIM = 4


def start(run, growth):
    run.description = replace(run.description, growth={"a": growth})
    return run.start(durability="journal")


def test_what_was_counted_and_forgotten_is_not_counted_after_a_restart(run):
    shard = start(run, Growth(admit_after=2, evict_after_seconds=100.0))
    rows = run.rows(0, 1)
    run.push(shard, 0, 1, rows=rows)
    assert shard.evict(now=4e9) == 0
    run.push(shard, 0, 2, rows=rows)
    assert shard.num_rows == [0, 0]
    versions = shard._state.versions
    shard.close()
    again = run.start()
    assert again.num_rows == [0, 0]
    assert again._state.versions == versions


def test_rows_of_a_checkpoint_are_as_old_after_a_restart(run):
    shard = start(run, Growth(evict_after_seconds=100.0))
    shard._state.tables[0].put_rows(np.arange(50), np.ones((50, DIM), np.float32), {})
    shard.snapshot()
    assert shard.evict(now=1000.0) == 0
    run.push(shard, 1, 1)
    assert shard.evict(now=1100.0) == 50 - 1  # lane 1 pushes row 1, and now
    held = shard.num_rows
    shard.close()
    assert run.start().num_rows == held
