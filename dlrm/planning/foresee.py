"""Foresees the time of a step, stage by stage and rank by rank, from a plan, a dense part and a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlrm.distributed.bucket_size import BUCKET_BYTES
from dlrm.planning.dense_cost import DenseCost
from embeddings.planning.collectives import all_reduce_seconds, all_to_all_seconds, barrier_seconds
from embeddings.planning.table_cost import GRADIENTS, IDS, ROWS, Setting, cost_of, shard_bytes
from embeddings.planning.table_cost import STAGES as TABLE_STAGES
from embeddings.shards import ShardingPlan
from embeddings.tables import TableConfig

STAGES = (
    *TABLE_STAGES[:3],
    *("dense forward", "dense backward"),
    *TABLE_STAGES[3:],
    *("exposed all-reduce", "dense update", "all else"),
)
# The ids' all-to-all has a header that says how many come.
MESSAGES = {IDS: 2, ROWS: 1, GRADIENTS: 1}
NUMBER_BYTES = 4
# How often activations are read and written (linear layer, ReLU), and weights with their moments in an update.
FORWARD_PASSES, BACKWARD_PASSES, UPDATE_PASSES = 2, 4, 14


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """The time of a step.

    Attributes:
        setting: what it was foreseen for.
        by_rank: seconds [ranks, stages].
        bytes_by_rank: of tables, with their optimizers' states [ranks].
        bytes_by_table: of each table on each rank [tables, ranks].
    """

    setting: Setting
    by_rank: NDArray[np.float64]
    bytes_by_rank: NDArray[np.int64]
    bytes_by_table: NDArray[np.int64]

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage on the rank that is slowest in it: the others wait for it at the next exchange."""
        return dict(zip(STAGES, self.by_rank.max(axis=0).tolist(), strict=True))

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return sum(self.stages.values())

    @property
    def samples_per_second(self) -> float:
        """Samples of all ranks per second."""
        return self.setting.usage.global_batch_size / self.seconds

    def imbalance(self, stage: int) -> float:
        """Return how much longer the slowest rank takes in a stage than the average one."""
        mean = float(self.by_rank[:, stage].mean())
        return float(self.by_rank[:, stage].max()) / mean if mean else 1.0


def foresee(configs: Sequence[TableConfig], plan: ShardingPlan, dense: DenseCost, setting: Setting) -> Foresight:
    """Return the time of a step under a plan."""
    machine, ranks, per_node = setting.machine, plan.ranks, plan.ranks_per_node
    holding, sizes = np.zeros((ranks, len(TABLE_STAGES))), np.zeros((len(configs), ranks), dtype=np.int64)
    asking, everywhere = np.zeros(len(TABLE_STAGES)), np.zeros(len(TABLE_STAGES))
    for number, (config, table) in enumerate(zip(configs, plan.tables, strict=True)):
        cost = cost_of(config, table, setting)
        np.add.at(holding, cost.holders, cost.holding)
        np.add.at(sizes[number], cost.holders, cost.bytes)
        asking += cost.asking
        everywhere += cost.everywhere
    tables = np.maximum(holding, asking) + everywhere
    if ranks > 1:
        travels = any(table.sharding != "replicated" for table in plan.tables)
        for stage, messages in MESSAGES.items():
            in_memory = setting.in_memory and stage != IDS
            message = barrier_seconds(machine, ranks) if in_memory else all_to_all_seconds(machine, ranks, per_node, 0)
            tables[:, stage] += messages * message * travels
        if any(table.sharding == "replicated" for table in plan.tables):
            tables[:, GRADIENTS] += all_reduce_seconds(machine, ranks, per_node, 0)
    by_stage = dict(zip(TABLE_STAGES, tables.T, strict=True)) | _dense_seconds(dense, setting)
    return Foresight(
        setting=setting,
        by_rank=np.stack([np.broadcast_to(by_stage[stage], ranks) for stage in STAGES], axis=1),
        bytes_by_rank=sizes.sum(axis=0),
        bytes_by_table=sizes,
    )


def _dense_seconds(dense: DenseCost, setting: Setting) -> dict[str, float]:
    machine, ranks, per_node = setting.machine, setting.ranks, setting.ranks_per_node
    slowdown = machine.slowdown(per_node)
    samples = setting.usage.global_batch_size / ranks
    copied = NUMBER_BYTES / machine.copy_bytes_per_second
    forward = samples * (dense.flops / machine.flops + FORWARD_PASSES * dense.numbers * copied) * slowdown
    backward = samples * (2 * dense.flops / machine.flops + BACKWARD_PASSES * dense.numbers * copied) * slowdown
    size = dense.parameters * NUMBER_BYTES
    buckets = max(1, round(size / BUCKET_BYTES))
    reduce = buckets * all_reduce_seconds(machine, ranks, per_node, size / buckets)
    # The last bucket leaves when the backward pass has ended.
    exposed = max(reduce - machine.overlap * backward, reduce / buckets)
    return {
        "dense forward": forward,
        "dense backward": backward,
        "exposed all-reduce": exposed,
        "dense update": UPDATE_PASSES * dense.parameters * copied * slowdown,
        "all else": machine.seconds_per_step * slowdown,
    }


def whole_bytes(configs: Sequence[TableConfig]) -> list[int]:
    """Return the bytes of each table, once."""
    return [shard_bytes(config, config.num_rows, config.dim) for config in configs]
