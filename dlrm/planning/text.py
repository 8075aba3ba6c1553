"""A plan as aligned text: where tables lie and why, what ranks hold, and how long a step takes."""

from __future__ import annotations

from collections.abc import Sequence

from dlrm.planning.foresee import STAGES, Foresight, whole_bytes
from dlrm.planning.simulate import Scaling
from embeddings.planning.task import count_of, format_bytes
from embeddings.shards import ShardingPlan, TablePlan
from embeddings.tables import TableConfig

SHOWN_RANKS = 4


def describe_plan(configs: Sequence[TableConfig], plan: ShardingPlan) -> str:
    """Return a line per table: rows, dim, bytes, sharding, ranks and the reason."""
    rows = [("table", "rows", "dim", "bytes", "sharding", "ranks", "why")]
    for config, table, size in zip(configs, plan.tables, whole_bytes(configs), strict=True):
        rows.append(
            (
                config.name,
                f"{config.num_rows:,}",
                str(config.dim),
                format_bytes(size),
                table.sharding,
                name_ranks(table, plan.ranks),
                table.why,
            )
        )
    return align(rows, right=(1, 2, 3))


def name_ranks(table: TablePlan, ranks: int) -> str:
    """Return which ranks hold a table: one, a range, a few, or how many."""
    held = sorted({shard.rank for shard in table.shards})
    if len(held) == 1:
        return str(held[0])
    if len(held) == ranks:
        return f"all {ranks}"
    if held[-1] - held[0] == len(held) - 1:
        return f"{held[0]}-{held[-1]}"
    return ", ".join(map(str, held)) if len(held) <= SHOWN_RANKS else f"{len(held)} of {ranks}"


def describe_ranks(foresight: Foresight, memory_bytes: int | None) -> str:
    """Return what ranks hold at least, on average and at most."""
    sizes = foresight.bytes_by_rank
    fullest, emptiest = int(sizes.argmax()), int(sizes.argmin())
    line = f"bytes per rank: {format_bytes(sizes.mean())} on average, {format_bytes(sizes.max())} on rank {fullest}"
    if len(sizes) > 1:
        line += f", {format_bytes(sizes.min())} on rank {emptiest}"
    return line + ("" if memory_bytes is None else f"; there are {format_bytes(memory_bytes)}")


def describe_step(foresight: Foresight) -> str:
    """Return a line per stage: the slowest rank's time, the average one's, and their ratio."""
    rows = [("stage", "slowest rank", "average", "imbalance")]
    for number, stage in enumerate(STAGES):
        seconds = foresight.by_rank[:, number]
        rows.append(
            (
                stage,
                format_milliseconds(float(seconds.max())),
                format_milliseconds(float(seconds.mean())),
                f"{foresight.imbalance(number):.2f}",
            )
        )
    average = float(foresight.by_rank.sum(axis=1).mean())
    total = foresight.seconds
    rows.append(("step", format_milliseconds(total), format_milliseconds(average), f"{total / average:.2f}"))
    speed = f"{foresight.samples_per_second:,.0f} samples/s at {foresight.setting.usage.global_batch_size:,} per step"
    return f"{align(rows, right=(1, 2, 3))}\n{speed}, {describe_machine(foresight)}"


def describe_machine(foresight: Foresight) -> str:
    """Say what a step was foreseen for, and whether ranks must share cores."""
    machine, per_node = foresight.setting.machine, foresight.setting.ranks_per_node
    words = f"as foreseen for machine '{machine.name}'"
    if per_node > machine.cores_per_node:
        shared = f"{count_of(machine.cores_per_node, 'core')}: each computes {machine.slowdown(per_node):.3g} times"
        words += f", where {per_node} ranks per machine share {shared} as long as one alone"
    return words


def describe_scaling(scalings: Sequence[Scaling]) -> str:
    """Return a line per number of ranks: step time, speed and efficiency, weak and strong."""
    rows: list[tuple[str, ...]] = [
        ("ranks", "weak: step", "samples/s", "efficiency", "strong: step", "samples/s", "efficiency")
    ]
    notes = []
    for scaling in scalings:
        cells = [f"{scaling.ranks:,}"]
        for foresight, efficiency in (
            (scaling.weak, scaling.weak_efficiency),
            (scaling.strong, scaling.strong_efficiency),
        ):
            if foresight is None or efficiency is None:
                cells += ["-", "-", "-"]
            else:
                cells += [
                    format_milliseconds(foresight.seconds),
                    f"{foresight.samples_per_second:,.0f}",
                    f"{efficiency:.1%}",
                ]
        rows.append(tuple(cells))
        if scaling.misfit:
            notes.append(f"{scaling.ranks:,} ranks: {scaling.misfit}")
    explained = (
        "weak: as many samples per rank as in the plan; strong: the same global batch. Efficiency is samples per "
        "second and rank over those of one rank with the same samples per rank (weak) or the whole batch (strong)."
    )
    return "\n".join([align(rows, right=range(7)), *notes, explained])


def format_milliseconds(seconds: float) -> str:
    """Write seconds in milliseconds, with three digits."""
    milliseconds = seconds * 1e3
    digits = 2 if milliseconds >= 1 else 4
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.{digits}f} ms"


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Set cells below one another, two spaces apart; columns in ``right`` end at one place."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
