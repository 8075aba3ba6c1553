"""Chunks cover each sample of each epoch once, and a lane's clocks have no gaps: compared with a plain walk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.tables import TableConfig
from parameter_server.coordinator.chunks import ChunkPlan
from parameter_server.description import RunDescription

RUN = RunDescription(run_id=1, seed=0, tables=(TableConfig(name="t", num_rows=10, dim=4, features=("f",)),))


@given(
    samples=st.integers(0, 300),
    epoch_samples=st.integers(0, 120),
    batch_size=st.integers(1, 9),
    chunk_batches=st.integers(1, 5),
    lanes=st.integers(1, 7),
    begun=st.floats(0, 1),
)
def test_chunks_cover_all_samples_once(
    samples: int, epoch_samples: int, batch_size: int, chunk_batches: int, lanes: int, begun: float
) -> None:
    run = replace(
        RUN,
        samples=samples,
        first_sample=int(begun * samples),
        epoch_samples=epoch_samples,
        batch_size=batch_size,
        chunk_batches=chunk_batches,
        lanes=lanes,
    )
    plan = ChunkPlan(run)
    epoch_length = epoch_samples or samples
    expected_start, clocks = run.first_sample, [1] * lanes
    for index in range(plan.num_chunks):
        chunk = plan.chunk(index)
        assert (chunk.index, chunk.lane) == (index, index % lanes)
        assert chunk.first_sample == expected_start
        last = chunk.first_sample + chunk.num_samples - 1
        assert chunk.epoch == chunk.first_sample // epoch_length == last // epoch_length
        assert chunk.num_batches == len(range(0, chunk.num_samples, batch_size)) <= chunk_batches
        ends_epoch = last + 1 == samples or (last + 1) % epoch_length == 0
        assert chunk.num_samples == batch_size * chunk_batches or ends_epoch
        assert chunk.first_clock == clocks[chunk.lane]
        clocks[chunk.lane] += chunk.num_batches
        expected_start = last + 1
    assert expected_start == samples


def test_a_chunk_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="expected an index below 0, got 0"):
        ChunkPlan(RUN).chunk(0)


@pytest.mark.parametrize(("name", "value"), [("samples", -1), ("samples", 1.5), ("lanes", 1 << 20)])
def test_numbers_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ChunkPlan(replace(RUN, **{name: value}))
