"""Plans where tables lie, from their bytes, the machine's bandwidths and what batches ask for; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from embeddings.machine import CPU, Machine
from embeddings.plan_search import Board, Choice, by_seconds, candidates_of, choose_ranks, search
from embeddings.shards import SHARDINGS, Sharding, ShardingPlan
from embeddings.table_cost import Setting, shard_bytes
from embeddings.tables import TableConfig, check_tables
from embeddings.usage import Usage

WHOLE: tuple[Sharding, ...] = ("table_wise",)
CUT: tuple[Sharding, ...] = ("column_wise", "row_wise")
OVER_NODES: tuple[Sharding, ...] = ("table_row_wise", "grid")


def plan_tables(
    configs: Sequence[TableConfig],
    *,
    ranks: int,
    ranks_per_node: int = 1,
    statistics: Usage | None = None,
    machine: Machine | None = None,
    memory_bytes: int | None = None,
    sharding: Sharding | Literal["auto"] = "auto",
    fixed: Mapping[str, Sharding] | None = None,
    replicate_below_rows: int = 2048,
) -> ShardingPlan:
    """Decide which rank holds which part of which table; the same arguments give the same plan everywhere.

    Args:
        configs: the tables.
        ranks: number of processes.
        ranks_per_node: of them on one machine.
        statistics: what a batch asks for; None means one id per bag, drawn evenly, and 8,192 samples.
        machine: where the ranks run; None is a CPU.
        memory_bytes: that tables may take on each rank; None means the machine's, if that is known.
        sharding: the kind of every table; ``auto`` chooses.
        fixed: kinds of tables by name, which come before ``sharding``.
        replicate_below_rows: ``auto`` copies tables with fewer rows to every rank.

    Raises:
        ValueError: the tables do not fit into memory, or a name or a kind does not exist.
    """
    check_tables(configs)
    fixed = dict(fixed or {})
    machine = machine or CPU
    memory_bytes = machine.memory_bytes if memory_bytes is None else memory_bytes
    _check_kinds(configs, sharding, fixed)
    setting = Setting(machine=machine, usage=statistics or Usage(), ranks=ranks, ranks_per_node=ranks_per_node)
    asked = {config.name: fixed.get(config.name, sharding) for config in configs}
    options = [
        candidates_of(config, _kinds(config, asked[config.name], setting, replicate_below_rows), setting)
        for config in configs
    ]
    found = search(options, setting, memory_bytes)
    if found is None:
        needed = sum(shard_bytes(config, config.num_rows, config.dim) for config in configs)
        raise ValueError(f"tables: expected {needed:,} bytes to fit into {ranks} x {memory_bytes:,} bytes")
    choices, board = found
    tables = tuple(
        choice.plan(ranks_per_node, _explain(choice, board, asked[choice.candidate.config.name], replicate_below_rows))
        for choice in choices
    )
    return ShardingPlan(ranks=ranks, ranks_per_node=ranks_per_node, tables=tables)


def _check_kinds(configs: Sequence[TableConfig], sharding: str, fixed: Mapping[str, str]) -> None:
    names = [config.name for config in configs]
    for name in fixed:
        if name not in names:
            raise ValueError(f"sharding: expected one of the tables {', '.join(names)}, got {name!r}")
    for kind in (sharding, *fixed.values()):
        if kind not in (*SHARDINGS, "auto"):
            raise ValueError(f"sharding: expected auto, {', '.join(SHARDINGS)}, got {kind!r}")


def _kinds(config: TableConfig, asked: str, setting: Setting, replicate_below_rows: int) -> tuple[Sharding, ...]:
    for kind in SHARDINGS:
        if asked == kind:
            return (kind,)
    if setting.ranks == 1:
        return WHOLE
    if config.num_rows < replicate_below_rows:
        return ("replicated",)
    return WHOLE + CUT + (OVER_NODES if 1 < setting.ranks_per_node < setting.ranks else ())


def _explain(choice: Choice, board: Board, asked: str, replicate_below_rows: int) -> str:
    """Say in a sentence why a table lies as it does."""
    config, kind = choice.candidate.config, choice.candidate.sharding
    if asked == kind:
        return f"{kind} was asked for"
    if board.setting.ranks == 1:
        return "there is one rank"
    if kind == "replicated":
        return (
            f"{config.num_rows:,} rows < {replicate_below_rows:,}: a copy on every rank, whose ids and rows need not "
            "travel"
        )
    size = shard_bytes(config, config.num_rows, config.dim)
    board.add(choice.cost, -1)
    whole = choose_ranks(candidates_of(config, WHOLE, board.setting)[0], board, by_seconds(board))
    fits, seconds, other = board.has_room(whole.cost), board.seconds(choice.cost), board.seconds(whole.cost)
    board.add(choice.cost)
    if kind == "table_wise":
        return f"{format_gb(size)} whole on rank {choice.ranks[0]}, which has the time and the room for it"
    if board.memory_bytes is not None and size > board.memory_bytes:
        reason = f"{format_gb(size)} do not fit into the {format_gb(board.memory_bytes)} of one rank"
    elif not fits:
        reason = f"{format_gb(size)} do not fit beside the other tables on one rank"
    else:
        reason = f"whole on one rank, all tables take {other * 1e3:.3g} ms of a step instead of {seconds * 1e3:.3g} ms"
    return f"{reason}: {_describe_cut(choice, board.setting)}"


def _describe_cut(choice: Choice, setting: Setting) -> str:
    candidate, count = choice.candidate, len(choice.cost.holders)
    if candidate.sharding == "row_wise":
        return f"rows cut over all {count} ranks" if count == setting.ranks else f"rows cut over {count} ranks"
    if candidate.sharding == "column_wise":
        return f"columns cut over {count} ranks"
    node = choice.ranks[0] // setting.ranks_per_node
    if candidate.sharding == "table_row_wise":
        return f"rows cut over the {count} ranks of node {node}"
    return f"columns cut over {candidate.nodes} nodes, and rows over the {setting.ranks_per_node} ranks of each"


def format_gb(count: float) -> str:
    """Write bytes as people say them, in powers of 1,000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
