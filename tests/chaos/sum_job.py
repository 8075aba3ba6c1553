"""The sum test's job: gradients are whole numbers that follow from samples' numbers, so that sums are exact and known.

With ``RowSGD`` at learning rate 1 and rows that start at 0, a row ends as minus the sum of its gradients, in whatever
order they came; fp32 adds whole numbers exactly up to 2 ** 24. A gradient that is applied twice, in part, to another
row, or not at all shows in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from embeddings.row_optimizers import RowSGD
from embeddings.tables import UNBOUNDED, TableConfig
from parameter_server.description import Durability, RunDescription

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Given = list[tuple[int, Longs, Floats]]  # table, ids [n] ascending, gradients [n, dim]

# (name, dim, different ids, ids per sample): few rows that all push, many that few do, and ids anywhere in 64 bits.
_SHAPES = (("popular", 4, 40, 2), ("large", 16, 6_000, 3), ("unbounded", 7, 3_000, 2))
_HAND_IDS = 300  # of each lane that pushes by hand, in each table, beyond those of samples


def describe(*, samples: int, durability: Durability = "journal", staleness: int | None = None) -> RunDescription:
    """Describes the run; its number is chosen by the coordinator."""
    tables = tuple(
        TableConfig(name=name, num_rows=UNBOUNDED, dim=dim, init_scale=0.0, optimizer=RowSGD(learning_rate=1.0))
        for name, dim, _, _ in _SHAPES
    )
    return RunDescription(
        run_id=0,
        seed=1,
        tables=tables,
        lanes=8,
        staleness=staleness,
        durability=durability,
        samples=samples,
        epoch_samples=samples - samples // 3,  # so that the last epoch ends early
        batch_size=64,
        chunk_batches=5,
    )


def gradients_of(first_sample: int, num_samples: int) -> Given:
    """Gives what the batch of some samples pushes: per table, the sums over its samples."""
    samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
    return [_sum_rows(table, samples) for table in range(len(_SHAPES))]


def expected_rows(samples: int) -> list[tuple[Longs, Floats]]:
    """Gives all rows, per table, that the samples [0, samples) lead to: ids [n] ascending and weights [n, dim]."""
    return [(ids, -sums) for _, ids, sums in gradients_of(0, samples)]


def hand_gradients(lane: int, clock: int) -> Given:
    """Gives what a push by hand holds: rows that only its lane pushes to, every one of them in every push."""
    given: Given = []
    for table, (_, dim, _, _) in enumerate(_SHAPES):
        ids = hand_ids(lane, table)
        values = _mix(ids.astype(np.uint64) * np.uint64(31) + np.uint64(clock))[:, None] + np.arange(
            dim, dtype=np.uint64
        )
        given.append((table, ids, 1 + (_mix(values) % np.uint64(5)).astype(np.float32)))
    return given


def hand_ids(lane: int, table: int) -> Longs:
    """Gives the ids that a lane pushes to by hand, ascending."""
    numbers = np.arange(_HAND_IDS, dtype=np.uint64) + np.uint64(1_000_000 + lane * _HAND_IDS)
    return np.sort(_name_rows(table, numbers))


def hand_rows(lane: int, clocks: Iterable[int]) -> list[Floats]:
    """Gives the rows of ``hand_ids``, per table, after some of the lane's pushes."""
    sums = [np.zeros((_HAND_IDS, dim), np.float32) for _, dim, _, _ in _SHAPES]
    for clock in clocks:
        for table, _, gradients in hand_gradients(lane, clock):
            sums[table] -= gradients
    return sums


def _sum_rows(table: int, samples: NDArray[np.uint64]) -> tuple[int, Longs, Floats]:
    _, dim, num_ids, per_sample = _SHAPES[table]
    draws = np.arange(per_sample, dtype=np.uint64) + np.uint64(100 * table)
    places = _mix(samples[:, None] * np.uint64(1000) + draws).reshape(-1)
    numbers = _mix(places) % np.uint64(num_ids)
    numbers = np.minimum(numbers, _mix(places + np.uint64(1)) % np.uint64(num_ids))  # low ones occur more often
    ids, where = np.unique(_name_rows(table, numbers), return_inverse=True)
    values = (_mix(places[:, None] + np.arange(dim, dtype=np.uint64)) % np.uint64(7)).astype(np.float64) - 3
    sums = np.zeros((ids.size, dim))
    np.add.at(sums, where.reshape(-1), values)
    return table, ids, sums.astype(np.float32)


def _name_rows(table: int, numbers: NDArray[np.uint64]) -> Longs:
    if _SHAPES[table][0] != "unbounded":
        return numbers.astype(np.int64)
    return (_mix(numbers + np.uint64(7)) >> np.uint64(1)).astype(np.int64)


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # SplitMix64 (Steele, Lea and Flood 2014), written again so that ids and buckets have nothing to do with one another
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
