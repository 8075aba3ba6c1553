"""What to say when tables do not fit: which, by how much, and what would make them fit, each tried by planning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from embeddings.planning.search import Board, by_bytes, fill
from embeddings.planning.table_cost import shard_bytes
from embeddings.planning.task import PlanTask, count_of, format_bytes
from embeddings.row_optimizers import RowSGD, RowWiseAdagrad
from embeddings.tables import TableConfig

MOST_RANKS = 1 << 12  # that are tried
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What would each, alone, make tables fit; None would not.

    Attributes:
        ranks: the smallest number of them.
        memory_bytes: of each rank.
        memory: the host's, for all tables of a GPU.
        row_type: of every row that is fp32 now.
        optimizer: the class's name, for every table.
        dim: of every table that is wider.
        replicate_below_rows: so that fewer tables are copied.
        auto: tables whose sharding was asked for, and which had better be planned.
    """

    ranks: int | None = None
    memory_bytes: int | None = None
    memory: str | None = None
    row_type: str | None = None
    optimizer: str | None = None
    dim: int | None = None
    replicate_below_rows: int | None = None
    auto: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return each in words."""
        words = []
        if self.auto:
            words.append(f"sharding auto instead of the one asked for ({_join(self.auto)})")
        if self.ranks is not None:
            words.append(count_of(self.ranks, "rank"))
        if self.memory_bytes is not None:
            words.append(f"{format_bytes(self.memory_bytes, up=True)} of memory per rank")
        if self.memory is not None:
            words.append(f"memory {self.memory}, the host's")
        if self.row_type is not None:
            words.append(f"row_type {self.row_type}")
        if self.optimizer is not None:
            words.append(f"{self.optimizer} as the row optimizer")
        if self.dim is not None:
            words.append(f"dim {self.dim}")
        if self.replicate_below_rows is not None:
            words.append(f"replicate_below_rows {self.replicate_below_rows}")
        return words


class DoesNotFitError(ValueError):
    """Tables that do not fit into the ranks' memory.

    Attributes:
        problem: what does not fit and why, without remedies.
        tables: the names of those that it is due to, the largest first.
        needed_bytes: on the fullest rank, if bytes are spread as evenly as they can be.
        available_bytes: on each rank.
        remedies: what would make them fit.
    """

    def __init__(
        self, *, tables: Sequence[str], why: str, needed_bytes: int, available_bytes: int, remedies: Remedies
    ) -> None:
        words = remedies.words()
        cure = f"would fit with: {'; or '.join(words)}" if words else "no single change would make them fit"
        self.problem = (
            f"tables do not fit: expected at most {format_bytes(available_bytes)} on each rank, got "
            f"{format_bytes(needed_bytes, up=True)} on the fullest, because {why}"
        )
        super().__init__(f"{self.problem}; {cure}")
        self.tables, self.remedies = tuple(tables), remedies
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


def explain_misfit(task: PlanTask) -> DoesNotFitError:
    """Make the error for tables that no plan was found for."""
    memory, needed = task.memory_bytes or 0, _fullest(task)
    tables, why = _blame_copies(task, memory) or _blame_pieces(task, memory) or _blame_all(task)
    return DoesNotFitError(
        tables=tables, why=why, needed_bytes=needed, available_bytes=memory, remedies=find_remedies(task, needed)
    )


def _blame_copies(task: PlanTask, memory: int) -> tuple[list[str], str] | None:
    copied = _largest_first([c for c in task.configs if task.candidates(c)[0].sharding == "replicated"])
    size = sum(map(_whole_bytes, copied))
    if size <= memory:
        return None
    names, counted = [config.name for config in copied], count_of(len(copied), "table")
    return names, f"the copies of {counted} take {format_bytes(size)} of every rank, above all {_join(_sizes(copied))}"


def _blame_pieces(task: PlanTask, memory: int) -> tuple[list[str], str] | None:
    least = {c.name: min(int(option.cost.bytes.max()) for option in task.candidates(c)) for c in task.configs}
    large = _largest_first([config for config in task.configs if least[config.name] > memory])
    if not large:
        return None
    names, kinds = [config.name for config in large], {option.sharding for option in task.candidates(large[0])}
    how = f" as {kinds.pop()}" if len(kinds) == 1 else ", however it is cut"
    why = f"table {_sizes(large)[0]} takes {format_bytes(least[names[0]])} of a rank{how}"
    return names, why + (f", and so for {_join(list(map(repr, names[1:])))}" if names[1:] else "")


def _blame_all(task: PlanTask) -> tuple[list[str], str]:
    largest, total = _largest_first(task.configs)[:3], sum(map(_whole_bytes, task.configs))
    counted, ranks = count_of(len(task.configs), "table"), count_of(task.setting.ranks, "rank")
    why = f"{counted} of {format_bytes(total)} in all on {ranks}, above all {_join(_sizes(largest))}"
    return [config.name for config in largest], why


def find_remedies(task: PlanTask, needed_bytes: int) -> Remedies:
    """Try what could make tables fit, one thing at a time, and return what does."""
    asked = tuple(name for name, kind in task.asked.items() if kind != "auto")
    return Remedies(
        ranks=_enough_ranks(task),
        memory_bytes=needed_bytes if replace(task, memory_bytes=needed_bytes).fits() else None,
        memory="uvm" if _fits_into_host(task) else None,
        row_type=_first(["bf16"], lambda row_type: _with_rows(task, row_type=row_type).fits()),
        optimizer=_first(
            ["RowWiseAdagrad", "RowSGD"], lambda name: _saves(task, name) and _with_optimizer(task, name).fits()
        ),
        dim=_wide_enough(task),
        replicate_below_rows=_copied_below(task),
        auto=asked if asked and replace(task, asked=dict.fromkeys(task.asked, "auto")).fits() else (),
    )


def _fullest(task: PlanTask) -> int:
    unlimited = Board(task.setting, None)
    fill([task.candidates(config) for config in task.configs], unlimited, by_bytes)
    return int(unlimited.bytes.max())


def _enough_ranks(task: PlanTask) -> int | None:
    """Return the smallest number of ranks that hold the tables; found from the bytes, then tried."""
    memory, per_node = task.memory_bytes or 0, task.setting.ranks_per_node
    options = {config.name: task.candidates(config) for config in task.configs}
    copied = sum(_whole_bytes(c) for c in task.configs if options[c.name][0].sharding == "replicated")
    cut = sum(map(_whole_bytes, task.configs)) - copied
    kept_whole = [c for c in task.configs if task.asked[c.name] == "table_wise"]
    if memory <= copied or any(_whole_bytes(config) > memory - copied for config in kept_whole):
        return None

    def fits(nodes: int) -> bool:
        return replace(task, setting=replace(task.setting, ranks=nodes * per_node)).fits()

    low = task.setting.ranks // per_node
    high = max(low + 1, math.ceil(cut / (memory - copied) / per_node))
    if high * per_node > MOST_RANKS or not (fits(high) or fits(MOST_RANKS // per_node)):
        return None
    while not fits(high):
        low, high = high, high + max(1, high - low)
        if high * per_node > MOST_RANKS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * per_node


def _fits_into_host(task: PlanTask) -> bool:
    """Say whether tables fit into the host's memory, where all are in that of a GPU which has less."""
    room = task.setting.machine.host_memory_bytes
    if room is None or room <= (task.memory_bytes or 0) or any(config.memory != "device" for config in task.configs):
        return False
    configs = tuple(replace(config, memory="uvm") for config in task.configs)
    return replace(task, configs=configs, memory_bytes=room).fits()


def _copied_below(task: PlanTask) -> int | None:
    """Return 0 if tables fit once none is copied, unless that was asked for."""
    fits = task.replicate_below_rows > 0 and replace(task, replicate_below_rows=0).fits()
    return 0 if fits else None


def _wide_enough(task: PlanTask) -> int | None:
    widest = max(config.dim for config in task.configs)
    return _last_fitting(range(4, widest, 4), lambda dim: _with_rows(task, dims=dim).fits())


def _last_fitting(numbers: Sequence[Number], fits: Callable[[Number], bool]) -> Number | None:
    """Return the last of ascending numbers that fits, where all before it fit as well."""
    low, high = 0, len(numbers)  # numbers[:low] fit, numbers[high:] do not
    while low < high:
        middle = (low + high) // 2
        if fits(numbers[middle]):
            low = middle + 1
        else:
            high = middle
    return numbers[low - 1] if low else None


def _with_rows(task: PlanTask, *, row_type: str | None = None, dims: int | None = None) -> PlanTask:
    configs = []
    for config in task.configs:
        if row_type is not None and config.row_type == "fp32":
            config = replace(config, row_type="bf16")
        if dims is not None:
            config = replace(config, dim=min(config.dim, dims))
        configs.append(config)
    return replace(task, configs=tuple(configs))


def _with_optimizer(task: PlanTask, name: str) -> PlanTask:
    optimizer = RowSGD(learning_rate=0.0) if name == "RowSGD" else RowWiseAdagrad(learning_rate=0.0)
    return replace(task, configs=tuple(replace(config, optimizer=optimizer) for config in task.configs))


def _saves(task: PlanTask, name: str) -> bool:
    changed = _with_optimizer(task, name)
    return sum(map(_whole_bytes, changed.configs)) < sum(map(_whole_bytes, task.configs))


def _first(names: Sequence[str], holds: Callable[[str], bool]) -> str | None:
    return next((name for name in names if holds(name)), None)


def _largest_first(configs: Sequence[TableConfig]) -> list[TableConfig]:
    return sorted(configs, key=lambda config: -_whole_bytes(config))


def _sizes(configs: Sequence[TableConfig]) -> list[str]:
    return [f"{config.name!r} ({format_bytes(_whole_bytes(config))})" for config in configs]


def _whole_bytes(config: TableConfig) -> int:
    return shard_bytes(config, config.num_rows, config.dim)


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
