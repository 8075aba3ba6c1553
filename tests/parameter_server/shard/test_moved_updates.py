"""Shards that come later correct Adam's moments as the others do, where training goes on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embeddings.row_optimizers import RowAdam
from embeddings.tables import TableConfig
from parameter_server.errors import RefusedError
from parameter_server.shard.row_storage import SET_UPDATES
from parameter_server.shard.shard import Shard
from parameter_server.shard.state_parts import pack_part
from parameter_server.wire import Header, Op, decode, encode, join

EVERYTHING = np.ones(4096, bool)


def store(shard: Shard, **head: int) -> int:
    """Sends a request without rows, and returns the table's number of updates."""
    message = join([encode(Header(op=Op.RECORDS, run_id=7, table=0, **head))])
    return decode(b"".join(shard.store(message)))[0].header.clock


@pytest.mark.parametrize("durability", ["none", "journal", "snapshot"])
def test_a_shard_that_buckets_move_to_counts_updates_as_the_one_they_come_from(run, durability):
    tables = tuple(TableConfig(name=n, num_rows=500, dim=4, optimizer=RowAdam(learning_rate=0.01)) for n in ("a", "b"))
    run.description = replace(run.description, tables=tables)
    first, second, reference = (
        run.start(number, (0,), name=name, durability=durability)
        for number, name in ((0, "first"), (1, "second"), (0, "reference"))
    )
    for shard in (first, reference):  # the second has no rows yet, and is not asked
        assert store(shard, codec=SET_UPDATES, clock=1000) == 1000
        run.push(shard, 0, 1)
    second.put_buckets(EVERYTHING, first.take_buckets(EVERYTHING), is_last=True)
    run.route(second, np.ones(4096, np.int32), 2)
    if durability != "none":
        if durability == "snapshot":
            second.snapshot()
        second.close()
        second = run.start(1, (1,), name="second", epoch=2)
    assert store(second) == 1001
    run.push(second, 0, 2, seq=1)
    run.push(reference, 0, 2)
    assert store(second) == 1002
    np.testing.assert_array_equal(run.pull(second), run.pull(reference))


def test_numbers_of_updates_of_other_tables_are_refused(run):
    shard = run.start()
    for wrong in (np.zeros(3, np.int64), np.zeros((2, 1), np.int64), np.zeros(2, np.float32)):
        with pytest.raises(RefusedError, match="expected a part of these tables"):
            shard.put_buckets(EVERYTHING, [pack_part({"base_updates": wrong})], is_last=False)
    assert shard.failed is None
