"""How often an id occurred in a batch bounds CowClip's step, wherever the push goes: rows, journals, second leases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embeddings.row_optimizers import RowCowClip
from embeddings.tables import TableConfig
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import buckets_of, salt_of
from parameter_server.shard.shard import Shard
from parameter_server.wire import Header, Op, encode, join

IDS = np.arange(40)
GRADIENTS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
COUNTS = (1 + IDS % 5).astype(np.uint32)


@pytest.fixture
def counting(run):
    """A run whose gradients are so long that they are clipped."""
    cowclip = RowCowClip(learning_rate=0.1, clip=0.1, l2=0.01, l2_mode="lazy")
    tables = tuple(TableConfig(name=n, num_rows=500, dim=4, init_scale=1.0, optimizer=cowclip) for n in ("a", "b"))
    run.description = replace(run.description, tables=tables)
    return run


def moments_of(shard: Shard) -> np.ndarray:
    _, state = shard._state.tables[0].read_rows(IDS)
    return state["first_moment"]


def test_an_id_that_occurred_more_often_may_have_a_longer_gradient(counting):
    counted, once = counting.start(name="counted"), counting.start(name="once")
    counting.push(counted, 0, 1, rows=(IDS, GRADIENTS), counts=COUNTS)
    counting.push(once, 0, 1, rows=(IDS, GRADIENTS))
    np.testing.assert_allclose(moments_of(counted), COUNTS[:, None] * moments_of(once), rtol=1e-5)


def test_counts_are_replayed_and_follow_rows_that_a_second_lease_brings(counting):
    expected = counting.start(name="expected", durability="journal")
    counting.push(expected, 0, 1, rows=(IDS, GRADIENTS), counts=COUNTS)
    shard = counting.start(name="cut")
    first = buckets_of(IDS, salt_of("a")) % 2 == 0
    counting.push(shard, 0, 1, rows=(IDS[first], GRADIENTS[first]), counts=COUNTS[first])
    counting.push(shard, 0, 1, lease=2, seq=1, rows=(IDS, GRADIENTS), counts=COUNTS)
    shard.close()
    again = counting.start(name="cut")
    assert again.counts.replayed == 3  # its claim to the buckets is one
    np.testing.assert_array_equal(moments_of(again), moments_of(expected))


def test_counts_that_cannot_be_are_refused(counting):
    shard = counting.start()
    none = COUNTS.copy()
    none[3] = 0
    with pytest.raises(RefusedError, match="expected ids that occurred, got a count of 0"):
        counting.push(shard, 0, 1, rows=(IDS, GRADIENTS), counts=none)
    asked = encode(Header(Op.PULL, run_id=7, dim=4), IDS, None, COUNTS)
    with pytest.raises(RefusedError, match="expected PULL frames") as caught:
        shard.pull(join([asked]))
    assert caught.value.refusal is Refusal.INVALID_ARGUMENT
    assert shard.num_rows == [0, 0]
