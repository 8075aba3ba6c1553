"""Our sharding plan in torchrec's words, and what of it torchrec cannot hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

from embeddings.row_optimizers import RowLamb, RowWiseAdagrad
from embeddings.shards import Shard, ShardingPlan, TablePlan
from embeddings.tables import TableConfig

_COLUMNS = 4  # fbgemm's rows are multiples of so many numbers


def fit_plan(plan: ShardingPlan, configs: Sequence[TableConfig]) -> tuple[ShardingPlan, list[str]]:
    """Cuts tables as torchrec can hold them, and says what that changes, one line per table.

    A replicated table, whose gradient torchrec would average and leave to another optimizer, goes to the rank that
    holds the fewest numbers. Rows are cut into blocks of equal length but for the last. Columns stay cut as they are,
    though fbgemm then takes what a row-wise optimizer measures over each shard's columns instead of the row.

    Raises:
        ValueError: When there is no such cut; it names the table.
    """
    held = [0] * plan.ranks
    for table in plan.tables:
        for shard in table.shards if table.sharding != "replicated" else ():
            held[shard.rank] += shard.num_rows * shard.num_columns
    tables, notes = [], []
    for config, table in zip(configs, plan.tables, strict=True):
        if table.sharding == "replicated":
            rank = min(range(plan.ranks), key=lambda rank: held[rank])
            held[rank] += config.num_rows * config.dim
            table = TablePlan(
                table=table.table,
                sharding="table_wise",
                shards=(replace(table.shards[0], rank=rank),),
                why="replicated in the plan, which torchrec has not",
            )
            notes.append(f"table {config.name!r}: on rank {rank} instead of replicated, which torchrec has not")
        elif table.sharding in ("row_wise", "table_row_wise", "grid"):
            ranks = plan.ranks if table.sharding == "row_wise" else plan.ranks_per_node
            table = replace(table, shards=tuple(_in_blocks(config, table, ranks)))
        _check_columns(config, table)
        if isinstance(config.optimizer, (RowWiseAdagrad, RowLamb)) and table.shards[0].num_columns < config.dim:
            notes.append(
                f"table {config.name!r}: cut by columns, and fbgemm's {type(config.optimizer).__name__} measures each "
                "shard's columns instead of the row, so that rows depend on the plan; place it row_wise or table_wise"
            )
        tables.append(table)
    return replace(plan, tables=tuple(tables)), notes


def parameter_sharding(config: TableConfig, table: TablePlan, device: str, ranks_per_node: int) -> Any:
    """Turns a table's plan into torchrec's ``ParameterSharding``."""
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
    from torchrec.distributed.types import ParameterSharding

    kinds = {"grid": "grid_shard"}
    kernels = {"device": "fused", "uvm": "fused_uvm", "uvm_caching": "fused_uvm_caching"}
    # Their grid names ranks by columns, then rows.
    shards = sorted(table.shards, key=lambda shard: (shard.first_column, shard.first_row))
    places = [
        ShardMetadata(
            shard_offsets=[shard.first_row, shard.first_column],
            shard_sizes=[shard.num_rows, shard.num_columns],
            placement=f"rank:{shard.rank}/" + (f"cuda:{shard.rank % ranks_per_node}" if device == "cuda" else device),
        )
        for shard in shards
    ]
    return ParameterSharding(
        sharding_type=kinds.get(table.sharding, table.sharding),
        compute_kernel=kernels[config.memory],
        ranks=[shard.rank for shard in shards],
        sharding_spec=EnumerableShardingSpec(places),
    )


def _in_blocks(config: TableConfig, table: TablePlan, ranks: int) -> Iterator[Shard]:
    """Cuts rows anew: torchrec finds an id's rank by dividing it by the length of a block."""
    by_column = sorted(table.shards, key=lambda shard: (shard.first_column, shard.rank))
    for _, shards in groupby(by_column, key=lambda shard: shard.first_column):
        pieces = list(shards)
        first_rank = pieces[0].rank // ranks * ranks
        block = -(-config.num_rows // ranks)
        held_by = [shard.rank for shard in pieces]
        if held_by != list(range(first_rank, first_rank + ranks)) or block * (ranks - 1) >= config.num_rows:
            over = "all" if table.sharding == "row_wise" else "one node's"
            raise ValueError(
                f"table {config.name!r}: expected {table.sharding} to cut {config.num_rows} rows over {over} {ranks} "
                f"ranks, some for each, as torchrec does, got ranks {held_by}; place it table_wise"
            )
        edges = [min(block * number, config.num_rows) for number in range(ranks + 1)]
        for shard, (first, last) in zip(pieces, pairwise(edges), strict=True):
            yield replace(shard, first_row=first, num_rows=last - first)


def _check_columns(config: TableConfig, table: TablePlan) -> None:
    for shard in table.shards:
        if shard.num_columns % _COLUMNS:
            raise ValueError(
                f"table {config.name!r}: expected shards of a multiple of {_COLUMNS} columns for fbgemm, got "
                f"{shard.num_columns}; place it over fewer ranks"
            )
