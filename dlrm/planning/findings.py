"""What the ranks of a measurement are told, and what they find; free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlrm.config import RunConfig
from embeddings.shards import ShardingPlan

COPY_NUMBERS = 1 << 23
SAMPLES, WIDTH = 2048, 512  # of a matrix product
TABLES, ROWS, BAGS = 4, 200_000, 8192
DIMS = (16, 64)
TINY_BATCH = 8
QUIET_SHARE = 0.25  # of the times that something took, the shortest ones


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of one rank.

    Attributes:
        copy: of ``COPY_NUMBERS`` float32.
        product: of [SAMPLES, WIDTH] with [WIDTH, WIDTH].
        lookups: of ``TABLES * BAGS`` ids of one-id bags, by dim.
        updates: of the same with row-wise Adagrad, by dim.
        shard: of a step on a table that is asked for next to nothing.
    """

    copy: float
    product: float
    lookups: tuple[float, ...]
    updates: tuple[float, ...]
    shard: float


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """What a rank is told.

    Attributes:
        folder: for the ranks to meet in, and for what they find.
        dataset: the prepared data's folder.
        run: the recipe.
        plan: None for one rank.
        ranks: number of ranks.
        steps_only: whether links and rates are left out.
    """

    folder: Path
    dataset: Path
    run: RunConfig
    plan: ShardingPlan | None
    ranks: int
    steps_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What ranks have measured together, in seconds.

    Attributes:
        rates: of one rank while the others do the same; None where they were left out.
        all_to_all: by bytes that each rank sends, its own part among them.
        all_reduce: by bytes.
        step: of a training step.
        median_step: the median of them, which others on the machine have a say in.
        tiny_step: of one with a batch of ``TINY_BATCH`` samples; 0 where it was not measured.
    """

    rates: Rates | None
    all_to_all: tuple[tuple[int, float], ...]
    all_reduce: tuple[tuple[int, float], ...]
    step: float
    median_step: float
    tiny_step: float


def quiet_seconds(seconds: Sequence[float]) -> float:
    """Return the mean of the fastest quarter: what others on the machine took is in the rest."""
    fastest = sorted(seconds)[: max(1, round(len(seconds) * QUIET_SHARE))]
    return sum(fastest) / len(fastest)
