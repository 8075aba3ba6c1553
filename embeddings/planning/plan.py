"""Plans where tables lie, from their bytes, the machine's bandwidths and what batches ask for; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from embeddings.planning.machine import CPU, Machine
from embeddings.planning.remedies import DoesNotFitError, explain_misfit
from embeddings.planning.search import Board, Choice, by_seconds, candidates_of, choose_ranks, search
from embeddings.planning.table_cost import FLOAT_BYTES, Setting, shard_bytes
from embeddings.planning.task import WHOLE, Asked, PlanTask, ask, count_of, format_bytes
from embeddings.shards import Sharding, ShardingPlan
from embeddings.tables import TableConfig
from embeddings.usage import Usage

__all__ = ["DoesNotFitError", "plan_tables"]


def plan_tables(
    configs: Sequence[TableConfig],
    *,
    ranks: int,
    ranks_per_node: int = 1,
    statistics: Usage | None = None,
    machine: Machine | None = None,
    memory_bytes: int | None = None,
    sharding: Asked = "auto",
    fixed: Mapping[str, Sharding] | None = None,
    replicate_below_rows: int = 2048,
    exchange_bytes: int = FLOAT_BYTES,
) -> ShardingPlan:
    """Decide which rank holds which part of which table; the same arguments give the same plan everywhere.

    Args:
        configs: the tables.
        ranks: number of processes.
        ranks_per_node: of them on one machine.
        statistics: what a batch asks for; None means one id per bag, drawn evenly, and 8,192 samples.
        machine: where the ranks run; None is a CPU.
        memory_bytes: that tables may take on each rank; None means the machine's for what lies where the tables do, if
            that is known: the least of them where tables lie in several places.
        sharding: the kind of every table; ``auto`` chooses.
        fixed: kinds of tables by name, which come before ``sharding``.
        replicate_below_rows: ``auto`` copies tables with fewer rows to every rank.
        exchange_bytes: of a number of a row that travels.

    Raises:
        DoesNotFitError: a ``ValueError`` that names the tables, and what would make them fit.
        ValueError: a name or a kind does not exist, or ranks do not make up nodes.
    """
    machine = machine or CPU
    if memory_bytes is not None:
        machine = replace(machine, memory_bytes=memory_bytes, host_memory_bytes=memory_bytes)
    limits = [machine.memory_for(config.memory) for config in configs]
    task = PlanTask(
        configs=tuple(configs),
        asked=ask(configs, sharding, fixed or {}),
        setting=Setting(
            machine=machine,
            usage=statistics or Usage(),
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            exchange_bytes=exchange_bytes,
        ),
        memory_bytes=min((limit for limit in limits if limit is not None), default=None),
        replicate_below_rows=replicate_below_rows,
    )
    choices = search(task.options(), task.setting, task.memory_bytes)
    if choices is None:
        raise explain_misfit(task)
    board = Board(task.setting, task.memory_bytes)
    for choice in choices:
        board.add(choice.cost)
    tables = tuple(choice.plan(ranks_per_node, _explain(choice, board, task)) for choice in choices)
    return ShardingPlan(ranks=ranks, ranks_per_node=ranks_per_node, tables=tables)


def _explain(choice: Choice, board: Board, task: PlanTask) -> str:
    """Say in a sentence why a table lies as it does."""
    config, kind = choice.candidate.config, choice.candidate.sharding
    if task.asked[config.name] == "replicated" != kind:
        return f"replicated was asked for, which torchrec has not: {_describe_cut(choice, task.setting)}"
    if task.asked[config.name] == kind:
        return f"{kind} was asked for: {_describe_cut(choice, task.setting)}"
    if task.setting.ranks == 1:
        return "there is one rank"
    if kind == "replicated":
        return f"copied: fewer than {task.replicate_below_rows:,} rows"
    if kind == "table_wise":
        return "fits whole, and cutting it would not save time"
    if board.memory_bytes is not None and shard_bytes(config, config.num_rows, config.dim) > board.memory_bytes:
        reason = f"does not fit into the {format_bytes(board.memory_bytes)} of one rank"
    else:
        reason = _compare_with_whole(choice, board)
    return f"{reason}: {_describe_cut(choice, task.setting)}"


def _compare_with_whole(choice: Choice, board: Board) -> str:
    board.add(choice.cost, -1)
    whole = choose_ranks(candidates_of(choice.candidate.config, WHOLE, board.setting)[0], board, by_seconds(board))
    fits, now, then = board.has_room(whole.cost), board.seconds(choice.cost), board.seconds(whole.cost)
    board.add(choice.cost)
    if not fits:
        return "does not fit whole beside the other tables"
    if then > now:
        return f"whole, it would make a step {(then - now) * 1e3:.2g} ms slower"
    return "whole, it would not save time"


def _describe_cut(choice: Choice, setting: Setting) -> str:
    candidate, ranks = choice.candidate, count_of(len(choice.cost.holders), "rank")
    if candidate.sharding == "table_wise":
        return f"whole on rank {choice.ranks[0]}"
    if candidate.sharding == "replicated":
        return "a copy on every rank"
    if candidate.sharding == "row_wise":
        return f"rows cut over {ranks}"
    if candidate.sharding == "column_wise":
        return f"columns cut over {ranks}"
    if candidate.sharding == "table_row_wise":
        return f"rows cut over the {ranks} of node {choice.ranks[0] // setting.ranks_per_node}"
    nodes, each = count_of(candidate.nodes, "node"), count_of(setting.ranks_per_node, "rank")
    return f"columns cut over {nodes}, rows over the {each} of each"
