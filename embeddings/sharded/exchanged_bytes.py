"""How many bytes leave each rank in a training step, computed from what sharding means and not from how it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embeddings.row_optimizers import RowCowClip, RowLamb, RowWiseAdagrad, moves_all_rows, trust_of
from embeddings.shards import EXCHANGE_BYTES, ShardingPlan
from embeddings.tables import TableConfig

Batch = Mapping[str, tuple[NDArray[Any], NDArray[Any]]]  # feature -> its ids [num_ids], its bags' lengths [batch_size]

_COUNT_BYTES, _SUM_BYTES, _WORD_BYTES = 8, 8, 4
_MOST_NARROW = 1 << 31  # rows that ids of 4 bytes count


class _Piece(NamedTuple):
    """A shard's rows that are the same as some other shard's, or no other's."""

    table: int
    rank: int
    first_row: int
    last_row: int
    columns: int


def expected_bytes(
    configs: Sequence[TableConfig],
    plan: ShardingPlan,
    batches: Sequence[Batch],
    *,
    exchange: str = "fp32",
    weighted: bool = False,
) -> list[dict[str, int]]:
    """Says what ``ShardedTables.bytes_sent`` grows by in one forward and backward.

    A bag asks each shard that holds rows of its ids for one vector of as many numbers as the shard has columns, and
    returns one gradient for it. For that it sends the ids, their weights if any, and how many there are where some bag
    asks the shard for more than one: 4 bytes each, but 8 for an id where some shard has more than 2**31 rows. Each rank
    tells each other rank two counts per shard and feature, and two more. A replicated table's summed gradients and
    counts enter an all-reduce. Optimizers that need sums over a split row send 8 bytes for each, for each row that
    moves, to the ranks that hold the row's other columns; of a split table, two sums enter an all-reduce in each round.

    Args:
        configs: The tables.
        plan: Of as many ranks as there are ``batches``.
        batches: By rank.
        exchange: Type in which vectors and gradients travel.
        weighted: Whether the batches have weights.
    """
    sent = [{"ids": 0, "rows": 0, "gradients": 0, "sums": 0} for _ in batches]
    number, scale = EXCHANGE_BYTES[exchange], 2 if exchange == "fp16" else 0
    pieces = _pieces(configs, plan)
    is_wide = any(piece.last_row - piece.first_row > _MOST_NARROW for piece in pieces)
    id_bytes = _WORD_BYTES * (1 + is_wide + weighted)
    for asker, batch in enumerate(batches):
        for holder in {*range(plan.ranks)} - {asker}:
            numbers, counts = 0, 2
            for piece in (piece for piece in pieces if piece.rank == holder):
                for feature in configs[piece.table].features:
                    cells, ids = _count(batch[feature], piece)
                    counts += 2
                    numbers += cells * piece.columns
                    sent[asker]["ids"] += ids * id_bytes + _WORD_BYTES * cells * (ids > cells)
            sent[asker]["ids"] += _COUNT_BYTES * counts
            sent[asker]["gradients"] += numbers * number + scale * (numbers > 0)
            sent[holder]["rows"] += numbers * number + scale * (numbers > 0)
    for rank in range(plan.ranks):
        for config, table in zip(configs, plan.tables, strict=True):
            if table.sharding == "replicated":
                sent[rank]["gradients"] += 4 * config.num_rows * (config.dim + 1)
        sent[rank]["sums"] = _count_sums(configs, pieces, batches, rank)
    return sent


def _pieces(configs: Sequence[TableConfig], plan: ShardingPlan) -> list[_Piece]:
    pieces = []
    for t, (config, table) in enumerate(zip(configs, plan.tables, strict=True)):
        if table.sharding == "replicated":
            continue
        edges = sorted({shard.first_row for shard in table.shards} | {config.num_rows})
        for shard in table.shards:
            pieces += [
                _Piece(t, shard.rank, first, last, shard.num_columns)
                for first, last in pairwise(edges)
                if shard.first_row <= first < shard.first_row + shard.num_rows
            ]
    return pieces


def _count(feature: tuple[NDArray[Any], NDArray[Any]], piece: _Piece) -> tuple[int, int]:
    ids, lengths = feature
    inside = (ids >= piece.first_row) & (ids < piece.last_row)
    bags = np.repeat(np.arange(len(lengths)), lengths)[inside]
    return len(np.unique(bags)), len(bags)


def _count_sums(configs: Sequence[TableConfig], pieces: Sequence[_Piece], batches: Sequence[Batch], rank: int) -> int:
    num_bytes = 0
    for piece in pieces:
        config = configs[piece.table]
        others = {other.rank for other in pieces if other[0] == piece[0] and other[2:4] == piece[2:4]} - {rank}
        if piece.rank != rank or not others or piece.columns == config.dim:
            continue
        ids = np.concatenate([batch[feature][0] for batch in batches for feature in config.features])
        moved = len(np.unique(ids[(ids >= piece.first_row) & (ids < piece.last_row)]))
        if moves_all_rows(config.optimizer):
            moved = piece.last_row - piece.first_row
        num_bytes += _SUM_BYTES * _sums_per_row(config) * moved * len(others)
    tables = {piece.table for piece in pieces if _needs_table_sums(configs[piece.table], piece)}
    rounds = max((_rounds(configs[piece.table], piece) for piece in pieces), default=0)
    return num_bytes + _SUM_BYTES * 2 * len(tables) * rounds


def _is_split(config: TableConfig, piece: _Piece) -> bool:
    return (piece.first_row, piece.last_row, piece.columns) != (0, config.num_rows, config.dim)


def _needs_table_sums(config: TableConfig, piece: _Piece) -> bool:
    return _is_split(config, piece) and trust_of(config.optimizer) != "row"


def _sums_per_row(config: TableConfig) -> int:
    if isinstance(config.optimizer, RowLamb):
        return config.optimizer.partial + 2 * (config.optimizer.trust == "row")
    return 2 if isinstance(config.optimizer, RowCowClip) else int(isinstance(config.optimizer, RowWiseAdagrad))


def _rounds(config: TableConfig, piece: _Piece) -> int:
    if not _is_split(config, piece):
        return 0
    if isinstance(config.optimizer, RowLamb):
        return 1 + config.optimizer.partial
    return int(isinstance(config.optimizer, RowWiseAdagrad | RowCowClip))
