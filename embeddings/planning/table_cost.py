"""What a shard costs: its bytes, and the seconds per step that it takes on the rank that holds it and on all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.planning.collectives import all_reduce_seconds, all_to_all_seconds_per_byte
from embeddings.planning.machine import Machine, RowRate
from embeddings.row_optimizers import counts_updates, moves_all_rows, state_columns
from embeddings.shards import TablePlan
from embeddings.tables import TableConfig
from embeddings.usage import Usage

# Columns of what a holder's and an asker's seconds are told in.
STAGES = ("ids all-to-all", "lookup", "rows all-to-all", "gradients all-to-all", "row update")
IDS, LOOKUP, ROWS, GRADIENTS, UPDATE = range(len(STAGES))
FLOAT_BYTES, COUNT_BYTES, COUNTER_BYTES = 4, 4, 8

Seconds = NDArray[np.float64]
Numbers = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that costs depend on beside the table and its plan.

    Attributes:
        machine: where ranks run.
        usage: what a batch asks for.
        ranks: number of processes.
        ranks_per_node: of them on one machine.
        exchange_bytes: of a number of a row that travels.
    """

    machine: Machine
    usage: Usage
    ranks: int
    ranks_per_node: int = 1
    exchange_bytes: int = FLOAT_BYTES

    @property
    def in_memory(self) -> bool:
        """Whether vectors are written to where they are wanted, instead of being sent."""
        machine, on_one_node = self.machine, self.ranks == self.ranks_per_node
        return machine.shares_memory and not machine.padded and on_one_node and self.exchange_bytes == FLOAT_BYTES


@dataclass(frozen=True, kw_only=True)
class TableCost:
    """What one table costs under one plan, per step.

    A stage takes a rank ``max(holding, asking) + everywhere``: what it sends as a holder of rows and what it receives
    for its own samples, or the other way round, go side by side.

    Attributes:
        holders: ranks that hold a shard, in the order of the plan's shards.
        bytes: of each shard, with the optimizer's state.
        holding: seconds of each holder [shards, stages].
        asking: seconds of every rank [stages], for what its own samples ask of others.
        everywhere: seconds of every rank [stages], beside the two.
    """

    holders: NDArray[np.int64]
    bytes: NDArray[np.int64]
    holding: Seconds
    asking: Seconds
    everywhere: Seconds


def shard_bytes(config: TableConfig, num_rows: int, num_columns: int) -> int:
    """Return the bytes of a rectangle of a table: rows in their type, and the optimizer's state in fp32."""
    return int(_bytes(config, num_rows, num_columns))


def row_number_bytes(config: TableConfig) -> int:
    """Return the bytes of one number of a stored row."""
    return 4 if config.row_type == "fp32" else 2


def _bytes(config: TableConfig, rows: Any, columns: Any) -> Any:
    per_row = columns * row_number_bytes(config) + _state_bytes_per_row(config, columns)
    return rows * per_row + (COUNTER_BYTES if counts_updates(config.optimizer, config.row_type) else 0)


def _state_bytes_per_row(config: TableConfig, num_columns: Any) -> Any:
    kept = state_columns(config.optimizer).values()
    return FLOAT_BYTES * sum(num_columns if has_columns else 1 for has_columns in kept)


def cost_of(config: TableConfig, plan: TablePlan, setting: Setting) -> TableCost:
    """Return what a table costs under a plan."""
    if plan.sharding == "replicated":
        return _cost_of_copies(config, len(plan.shards), setting)
    machine, usage, batch = setting.machine, setting.usage.of(config), setting.usage.global_batch_size
    rows, columns = _sizes(plan)
    ids, cells = (batch * count for count in count_cells(config, plan, setting))
    all_ids = batch * usage.ids_per_sample
    share = np.maximum(ids / max(all_ids, 1e-300), rows / config.num_rows)
    distinct = np.minimum(np.minimum(rows, ids), usage.distinct_rows(all_ids, config.num_rows) * share)
    moved = rows if moves_all_rows(config.optimizer) else distinct
    vectors = cells * columns * setting.exchange_bytes
    per_byte = all_to_all_seconds_per_byte(machine, setting.ranks, setting.ranks_per_node)
    slowdown = machine.slowdown(setting.ranks_per_node)
    holding = np.zeros((len(rows), len(STAGES)))
    counts = np.where(ids > cells, cells * COUNT_BYTES, 0.0)  # where every bag has one id, nothing need be said
    holding[:, IDS] = (ids * setting.usage.id_bytes + counts) * per_byte
    holding[:, ROWS] = holding[:, GRADIENTS] = vectors * _seconds_per_vector_byte(plan, setting)
    asking = holding.sum(axis=0) / setting.ranks
    for stage, seconds in (
        (LOOKUP, lookup_seconds(config, ids, columns, machine)),
        (UPDATE, update_seconds(config, ids, moved, columns, machine)),
    ):
        holding[:, stage] = slowdown * (machine.seconds_per_shard / 2 + seconds)
    # Whoever asked adds what comes back up into the vectors of its samples, and cuts their gradient the same way.
    everywhere = np.zeros(len(STAGES))
    everywhere[IDS] = slowdown * ids.sum() / setting.ranks * machine.cut_seconds_per_id
    everywhere[[LOOKUP, UPDATE]] = slowdown * 2 * vectors.sum() / setting.ranks / machine.copy_bytes_per_second
    holders = np.array([shard.rank for shard in plan.shards])
    return TableCost(
        holders=holders, bytes=_bytes(config, rows, columns), holding=holding, asking=asking, everywhere=everywhere
    )


def count_cells(config: TableConfig, plan: TablePlan, setting: Setting) -> tuple[Numbers, Numbers]:
    """Return how many ids and how many (partial) bags of a sample each shard is asked for, on average.

    A bag of L ids, of which a share f falls on the shard, asks it for something with probability 1 - (1 - f) ** L.
    """
    usage = setting.usage.of(config)
    first = np.array([shard.first_row for shard in plan.shards])
    share = usage.share_of_rows(first, _sizes(plan)[0], config.num_rows)
    ids = usage.ids_per_sample * share
    if setting.machine.padded:
        return ids, np.full(len(ids), float(len(config.features)))
    length = usage.ids_per_sample / max(usage.bags_per_sample, 1e-300)
    return ids, usage.bags_per_sample * (1.0 - (1.0 - np.minimum(share, 1.0)) ** length)


def lookup_seconds(config: TableConfig, ids: Numbers, num_columns: Numbers, machine: Machine) -> Numbers:
    """Return the time to look ids up and pool them."""
    row_bytes = num_columns * row_number_bytes(config)
    return np.asarray(ids * (machine.lookup.seconds_per_id + row_bytes / _bandwidth(config, machine.lookup, machine)))


def update_seconds(
    config: TableConfig, ids: Numbers, moved: Numbers, num_columns: Numbers, machine: Machine
) -> Numbers:
    """Return the time to sum the gradients of ids and to update ``moved`` rows: each is read and written."""
    touched = 2 * moved * (num_columns * row_number_bytes(config) + _state_bytes_per_row(config, num_columns))
    moving = touched / _bandwidth(config, machine.update, machine)
    return np.asarray(
        ids * (machine.update.seconds_per_id + num_columns * FLOAT_BYTES / machine.update.bytes_per_second) + moving
    )


def _bandwidth(config: TableConfig, rate: RowRate, machine: Machine) -> float:
    """Return the bandwidth of a table's rows; a cache in the GPU's memory is taken to hold none that is asked for."""
    if config.memory == "device" or machine.host_bytes_per_second is None:
        return rate.bytes_per_second
    return min(rate.bytes_per_second, machine.host_bytes_per_second)


def _sizes(plan: TablePlan) -> tuple[Numbers, Numbers]:
    sizes = np.array([(shard.num_rows, shard.num_columns) for shard in plan.shards], dtype=np.int64)
    return sizes[:, 0], sizes[:, 1]


def _seconds_per_vector_byte(plan: TablePlan, setting: Setting) -> float:
    machine, ranks, per_node = setting.machine, setting.ranks, setting.ranks_per_node
    if setting.in_memory:
        return 0.0
    if machine.padded and plan.sharding in ("table_row_wise", "grid"):
        # Partial sums are added up within the node, and each of its ranks sends its part of the result to the others.
        within = all_to_all_seconds_per_byte(machine, per_node, per_node)
        return within + all_to_all_seconds_per_byte(machine, ranks, per_node) / per_node
    return all_to_all_seconds_per_byte(machine, ranks, per_node)


def _cost_of_copies(config: TableConfig, ranks: int, setting: Setting) -> TableCost:
    machine, usage, batch = setting.machine, setting.usage.of(config), setting.usage.global_batch_size
    own_ids = np.array(batch * usage.ids_per_sample / setting.ranks)
    distinct = usage.distinct_rows(batch * usage.ids_per_sample, config.num_rows)
    moved = np.array(config.num_rows if moves_all_rows(config.optimizer) else distinct)
    dim = np.array(config.dim)
    sums = config.num_rows * (config.dim + 1) * FLOAT_BYTES
    everywhere = np.zeros(len(STAGES))
    everywhere[LOOKUP] = machine.seconds_per_shard / 2 + lookup_seconds(config, own_ids, dim, machine)
    everywhere[UPDATE] = (
        machine.seconds_per_shard / 2
        + update_seconds(config, own_ids, moved, dim, machine)
        + 2 * sums / machine.copy_bytes_per_second
    )
    everywhere *= machine.slowdown(setting.ranks_per_node)
    # One all-reduce carries the sums of all copies: its latency is that of the step.
    everywhere[GRADIENTS] = all_reduce_seconds(machine, setting.ranks, setting.ranks_per_node, sums, latency=False)
    return TableCost(
        holders=np.arange(ranks),
        bytes=np.full(ranks, shard_bytes(config, config.num_rows, config.dim)),
        holding=np.zeros((ranks, len(STAGES))),
        asking=np.zeros(len(STAGES)),
        everywhere=everywhere,
    )
