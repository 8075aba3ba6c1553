"""Looks for the plan under which the slowest rank is fastest: longest table first, then one table moved at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.planning.table_cost import STAGES, Setting, TableCost, cost_of
from embeddings.shards import Sharding, TablePlan, place
from embeddings.tables import TableConfig

SWEEPS = 8  # over all tables; the second finds little, and the fourth hardly anything
WORTH = 0.01  # share of a step for which one plan is taken before one with fewer pieces
CUT_WORTH = 0.005  # share of a step for which one table is cut: pieces bring work and messages that no model counts


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to cut a table, whose pieces are not on ranks yet.

    Attributes:
        config: the table.
        sharding: the kind.
        pieces: ranks that get a piece each; on ``nodes`` nodes, if the kind says which ranks belong together.
        nodes: number of nodes, 0 if pieces may go to any ranks.
        cost: with piece i on rank i.
    """

    config: TableConfig
    sharding: Sharding
    pieces: int
    nodes: int
    cost: TableCost


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate with its ranks."""

    candidate: Candidate
    ranks: tuple[int, ...]
    cost: TableCost

    def plan(self, ranks_per_node: int, why: str = "") -> TablePlan:
        """Return the table's plan."""
        candidate = self.candidate
        return place(candidate.config, candidate.sharding, self.ranks, ranks_per_node=ranks_per_node, why=why)


class Board:
    """What every rank holds and does so far.

    Args:
        setting: where the ranks run, and what a batch asks for.
        memory_bytes: of a rank; None is no limit.
    """

    def __init__(self, setting: Setting, memory_bytes: int | None) -> None:
        self.setting, self.memory_bytes = setting, memory_bytes
        self.bytes = np.zeros(setting.ranks, dtype=np.int64)
        self.holding = np.zeros((setting.ranks, len(STAGES)))
        self.asking, self.everywhere = np.zeros(len(STAGES)), np.zeros(len(STAGES))

    def add(self, cost: TableCost, sign: int = 1) -> None:
        """Put a table's shards on their ranks, or take them off (``sign=-1``)."""
        np.add.at(self.bytes, cost.holders, sign * cost.bytes)
        np.add.at(self.holding, cost.holders, sign * cost.holding)
        self.asking += sign * cost.asking
        self.everywhere += sign * cost.everywhere

    def has_room(self, cost: TableCost) -> bool:
        """Say whether a table's shards fit beside what lies there."""
        if self.memory_bytes is None:
            return True
        return bool((self.bytes[cost.holders] + cost.bytes <= self.memory_bytes).all())

    def stages(self) -> NDArray[np.float64]:
        """Return the seconds of every rank in each stage [ranks, stages]."""
        return np.maximum(self.holding, self.asking) + self.everywhere

    def seconds(self, cost: TableCost | None = None) -> float:
        """Return how long a step takes, with one table more: each stage waits for its slowest rank."""
        slowest = self.holding.max(axis=0)
        if cost is None:
            return float((np.maximum(slowest, self.asking) + self.everywhere).sum())
        slowest = np.maximum(slowest, (self.holding[cost.holders] + cost.holding).max(axis=0))
        return float((np.maximum(slowest, self.asking + cost.asking) + self.everywhere + cost.everywhere).sum())

    def unevenness(self, cost: TableCost) -> float:
        """Return by what a table adds to the sum of squares of ranks' seconds; decides between equals."""
        before, more = self.holding[cost.holders].sum(axis=1), cost.holding.sum(axis=1)
        return float((more * (2 * before + more)).sum())


def candidates_of(config: TableConfig, kinds: Sequence[Sharding], setting: Setting) -> list[Candidate]:
    """List the ways to cut a table by these kinds, in a fixed order."""
    made = []
    for kind in kinds:
        for pieces, nodes in _counts(config, kind, setting):
            ranks = range(pieces)
            plan = place(config, kind, ranks, ranks_per_node=setting.ranks_per_node)
            cost = cost_of(config, plan, setting)
            made.append(Candidate(config=config, sharding=kind, pieces=pieces, nodes=nodes, cost=cost))
    return made


def _counts(config: TableConfig, kind: Sharding, setting: Setting) -> list[tuple[int, int]]:
    """List (pieces, nodes) for a kind; none where torchrec has to hold the table and cannot."""
    ranks, per_node, padded = setting.ranks, setting.ranks_per_node, setting.machine.padded
    if kind == "table_wise":
        return [(1, 0)]
    # torchrec cuts rows in blocks of equal length but for the last, of which none may be empty.
    blocks = ranks if kind == "row_wise" else per_node
    if (
        padded
        and kind not in ("column_wise", "replicated")
        and -(-config.num_rows // blocks) * (blocks - 1) >= (config.num_rows)
    ):
        return []
    if kind in ("row_wise", "replicated"):
        return [(ranks, 0)]
    if kind == "table_row_wise":
        return [(per_node, 1)]
    if kind == "grid":
        return [(nodes * per_node, nodes) for nodes in _column_counts(config.dim, ranks // per_node, padded)]
    return [(count, 0) for count in _column_counts(config.dim, ranks, padded)]


def _column_counts(dim: int, places: int, must_be_fours: bool) -> list[int]:
    """List into how many pieces columns may be cut: whole quadruples of columns each, as fbgemm wants, if possible."""
    most = min(dim, places)
    if most == 1:
        return [1]
    counts = sorted({2**i for i in range(1, most.bit_length()) if 2**i <= most} | {most})
    return [count for count in counts if dim % (4 * count) == 0] or ([] if must_be_fours else counts)


def choose_ranks(candidate: Candidate, board: Board, load: NDArray[Any]) -> Choice:
    """Put a candidate's pieces on ranks: the dearest piece where the load is least, among those that have room."""
    ranks, per_node = board.setting.ranks, board.setting.ranks_per_node
    cost = candidate.cost
    if candidate.sharding == "replicated":
        return Choice(candidate=candidate, ranks=tuple(range(ranks)), cost=cost)
    if candidate.nodes:
        node_load = load.reshape(-1, per_node).max(axis=1)
        full = _is_full(board, cost).reshape(-1, per_node).any(axis=1)
        chosen = np.sort(np.lexsort((np.arange(len(node_load)), node_load, full))[: candidate.nodes])
        groups = [np.arange(node * per_node, (node + 1) * per_node) for node in chosen]
    else:
        by_load = np.lexsort((np.arange(ranks), load, _is_full(board, cost)))
        groups = [by_load[: candidate.pieces]]
    order = np.concatenate([_match(group, i, candidate, board, load) for i, group in enumerate(groups)])
    return Choice(candidate=candidate, ranks=tuple(order.tolist()), cost=replace(cost, holders=order[cost.holders]))


def _match(group: NDArray[Any], index: int, candidate: Candidate, board: Board, load: NDArray[Any]) -> NDArray[Any]:
    """Give the pieces of one group to its ranks, the dearest to the least loaded."""
    if board.setting.machine.padded and candidate.sharding in ("row_wise", "table_row_wise", "grid"):
        return np.sort(group)  # torchrec finds the rank of a row by its number
    size = len(group)
    cost = np.zeros(size)
    mine = (candidate.cost.holders // size) == index if candidate.nodes else np.full(len(candidate.cost.holders), True)
    cost[candidate.cost.holders[mine] - index * size] = candidate.cost.holding[mine].sum(axis=1)
    dearest = np.lexsort((np.arange(size), -cost))
    ranks = np.empty(size, dtype=np.int64)
    ranks[dearest] = group[np.lexsort((group, load[group]))]
    return ranks


def _is_full(board: Board, cost: TableCost) -> NDArray[Any]:
    if board.memory_bytes is None:
        return np.zeros(board.setting.ranks, dtype=bool)
    return np.asarray(board.bytes + int(cost.bytes.max()) > board.memory_bytes)


Load = Callable[[Board], NDArray[Any]]


def by_seconds(board: Board) -> NDArray[Any]:
    """Return the ranks' load as the seconds they take."""
    return np.asarray(board.holding.sum(axis=1))


def by_bytes(board: Board) -> NDArray[Any]:
    """Return the ranks' load as the bytes they hold."""
    return board.bytes


def search(options: Sequence[Sequence[Candidate]], setting: Setting, memory_bytes: int | None) -> list[Choice] | None:
    """Choose one candidate and its ranks for every table; None if nothing was found that fits into memory."""
    whole = [[c for c in candidates if c.pieces == 1] or candidates for candidates in options]
    found = []
    for start, load in ((whole, by_seconds), (options, by_seconds), (options, by_bytes)):
        board = Board(setting, memory_bytes)
        choices = fill(start, board, load)
        if choices is not None:
            _improve(options, choices, board)
            found.append((board.seconds(), choices))
    # Of those that are as good as equal, the first has the fewest pieces.
    best = min((seconds for seconds, _ in found), default=0.0)
    return next((choices for seconds, choices in found if seconds <= best * (1 + WORTH)), None)


def fill(options: Sequence[Sequence[Candidate]], board: Board, load: Load) -> list[Choice] | None:
    """Put one table after the other on the board, the dearest first; None if one found no room."""
    chosen: dict[int, Choice] = {}

    def weight(table: int) -> float:
        cost = options[table][0].cost
        return float(cost.bytes.sum() if load is by_bytes else cost.holding.sum())

    # What leaves no choice comes before what does.
    for table in sorted(range(len(options)), key=lambda t: (len(options[t]) > 1, -weight(t), t)):
        choice = _best(options[table], board, load)
        if choice is None:
            return None
        board.add(choice.cost)
        chosen[table] = choice
    return [chosen[table] for table in range(len(options))]


def _best(candidates: Sequence[Candidate], board: Board, load: Load) -> Choice | None:
    loads = load(board)
    choices = [choose_ranks(candidate, board, loads) for candidate in candidates]
    fitting = [choice for choice in choices if board.has_room(choice.cost)]
    return min(fitting, key=lambda choice: _key(board, choice, load), default=None)


def _key(board: Board, choice: Choice, load: Load) -> tuple[float, float]:
    cost = choice.cost
    if load is by_bytes:
        return float((board.bytes[cost.holders] + cost.bytes).max()), board.seconds(cost)
    seconds = board.seconds(cost) * (1.0 if choice.candidate.pieces == 1 else 1.0 + CUT_WORTH)
    # Rounded, so that what differs by the order of additions only is equal.
    return round(seconds, 12), round(board.unevenness(cost), 15)


def _improve(options: Sequence[Sequence[Candidate]], choices: list[Choice], board: Board) -> None:
    for _ in range(SWEEPS):
        before = board.seconds()
        for table, candidates in enumerate(options):
            former = choices[table]
            board.add(former.cost, -1)
            best = _best(candidates, board, by_seconds)
            if best is None or _key(board, best, by_seconds) >= _key(board, former, by_seconds):
                best = former
            board.add(best.cost)
            choices[table] = best
        if board.seconds() > before * (1 - 1e-6):
            return
