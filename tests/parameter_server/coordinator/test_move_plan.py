"""Plans of moves end balanced, empty those that leave, and move no bucket twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.coordinator.move_plan import plan_move
from parameter_server.partition import spread_evenly


@settings(deadline=None)
@given(
    before=st.sets(st.integers(0, 6), min_size=1),
    after=st.sets(st.integers(0, 6), min_size=1),
    portion=st.sampled_from([1000, 64, 4096]),
)
def test_plans_end_balanced(before: set[int], after: set[int], portion: int) -> None:
    owners, times = spread_evenly(sorted(before)), np.zeros(NUM_BUCKETS, np.int64)
    while move := plan_move(owners, sorted(after), portion):
        assert move.sender != move.receiver
        assert move.receiver in after
        assert (owners[move.buckets] == move.sender).all()
        assert 1 <= move.buckets.sum() <= portion
        owners = owners.copy()
        owners[move.buckets] = move.receiver
        times += move.buckets
    counts = [int((owners == shard).sum()) for shard in after]
    assert sum(counts) == NUM_BUCKETS
    assert max(counts) - min(counts) <= 1
    assert times.max() <= 1


def test_nobody_to_move_to() -> None:
    assert plan_move(spread_evenly([0]), [], 64) is None
