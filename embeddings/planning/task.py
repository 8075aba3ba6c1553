"""All that a plan depends on, checked: tables, kinds that were asked for, ranks, machine and memory."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from embeddings.planning.search import Board, Candidate, by_bytes, by_seconds, candidates_of, fill
from embeddings.planning.table_cost import Setting
from embeddings.shards import SHARDINGS, Sharding
from embeddings.tables import TableConfig, check_tables

Asked = Sharding | Literal["auto"]
WHOLE: tuple[Sharding, ...] = ("table_wise",)
CUT: tuple[Sharding, ...] = ("column_wise", "row_wise")
OVER_NODES: tuple[Sharding, ...] = ("table_row_wise", "grid")
SHOWN_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class PlanTask:
    """What is to be planned.

    Attributes:
        configs: the tables.
        asked: the kind of each table, by name.
        setting: ranks, machine, and what a batch asks for.
        memory_bytes: that tables may take on each rank; None is no limit.
        replicate_below_rows: ``auto`` copies tables with fewer rows to every rank.

    Raises:
        ValueError: a table or a kind does not exist, or ranks do not make up nodes.
    """

    configs: tuple[TableConfig, ...]
    asked: Mapping[str, Asked]
    setting: Setting
    memory_bytes: int | None
    replicate_below_rows: int

    def __post_init__(self) -> None:
        check_tables(self.configs)
        ranks, per_node = self.setting.ranks, self.setting.ranks_per_node
        if ranks < 1 or per_node < 1 or ranks % per_node:
            raise ValueError(f"ranks: expected a multiple of ranks_per_node, got {ranks} and {per_node}")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"memory: expected at least 1 byte per rank, got {self.memory_bytes}")
        for kind in self.asked.values():
            if kind not in (*SHARDINGS, "auto"):
                raise ValueError(f"sharding: expected auto, {', '.join(SHARDINGS)}, got {kind!r}")

    def candidates(self, config: TableConfig) -> list[Candidate]:
        """List the ways in which a table may be cut."""
        return candidates_of(config, self._kinds(config), self.setting)

    def options(self) -> list[list[Candidate]]:
        """List the ways in which each table may be cut.

        Raises:
            ValueError: torchrec has to hold the tables, and cannot cut one of them as it was asked for.
        """
        options = [self.candidates(config) for config in self.configs]
        for config, candidates in zip(self.configs, options, strict=True):
            if not candidates:
                raise ValueError(
                    f"table {config.name!r}: expected a kind that cuts {config.num_rows} rows of {config.dim} numbers "
                    f"as torchrec does, rows in {count_of(self.setting.ranks, 'rank')} some for each and columns in "
                    f"fours, got {self.asked[config.name]}; place it table_wise"
                )
        return options

    def fits(self) -> bool:
        """Say whether there is a plan."""
        options = [self.candidates(config) for config in self.configs]
        if not all(options):
            return False
        boards = [Board(self.setting, self.memory_bytes) for _ in range(2)]
        loads = (by_bytes, by_seconds)
        return any(fill(options, board, load) is not None for board, load in zip(boards, loads, strict=True))

    def _kinds(self, config: TableConfig) -> Sequence[Sharding]:
        asked = self.asked[config.name]
        has_copies = not self.setting.machine.padded  # torchrec has none
        if asked != "auto":
            return (asked,) if asked != "replicated" or has_copies else WHOLE
        if self.setting.ranks == 1:
            return WHOLE
        if config.num_rows < self.replicate_below_rows and has_copies:
            return ("replicated",)
        return WHOLE + CUT + (OVER_NODES if 1 < self.setting.ranks_per_node < self.setting.ranks else ())


def ask(configs: Sequence[TableConfig], sharding: Asked, fixed: Mapping[str, Asked]) -> dict[str, Asked]:
    """Return the kind that was asked for of each table.

    Raises:
        ValueError: ``fixed`` names a table that does not exist.
    """
    names = [config.name for config in configs]
    for name in fixed:
        if name not in names:
            raise ValueError(f"sharding: expected one of the tables {name_choices(name, names)}, got {name!r}")
    return {name: fixed.get(name, sharding) for name in names}


def name_choices(wrong: str, names: Sequence[str]) -> str:
    """List the names that somebody may have meant: the nearest, or all if they are few."""
    near = difflib.get_close_matches(wrong, names, n=SHOWN_NAMES)
    shown = near or names[:SHOWN_NAMES]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")


def count_of(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(count: float, *, up: bool = False) -> str:
    """Write bytes with three digits, in powers of 1,000; ``up`` never writes less than there are."""
    if count < 1000:
        return f"{math.ceil(count) if up else count:.0f} bytes"
    units = (("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))
    for name, size in units:
        digits = max(0, 3 - len(str(int(count / size))))
        steps = count / (size // 10**digits)
        number = (math.ceil(steps) if up else round(steps)) / 10**digits
        text = f"{number:.{digits}f}"
        written = f"{text.rstrip('0').rstrip('.') if digits else text} {name}"
        if number < 1000:
            break
    return written
