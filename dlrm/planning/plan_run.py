"""From a run's settings and data to its plan: the flags of `--parallel`, the data's statistics, the memory there is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from dlrm.config import ParallelConfig
from dlrm.data.dataset import Dataset
from dlrm.planning.statistics import measure_usage
from dlrm.this_machine import memory_bytes
from embeddings.planning.machine import Machine
from embeddings.planning.plan import DoesNotFitError, plan_tables
from embeddings.planning.remedies import Remedies
from embeddings.planning.table_cost import Setting
from embeddings.planning.task import format_bytes, name_choices
from embeddings.shards import EXCHANGE_BYTES, SHARDINGS, Sharding, ShardingPlan
from embeddings.tables import TableConfig

GPU_SHARE = 0.8
OPTIMIZERS = {"RowWiseAdagrad": "rowwise_adagrad", "RowSGD": "sgd"}
SHOWN_TABLES = 3
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_BYTES = 1 << 60
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def setting_of(
    configs: Sequence[TableConfig],
    parallel: ParallelConfig,
    dataset: Dataset,
    *,
    machine: Machine,
    ranks: int,
    ranks_per_node: int,
    global_batch_size: int,
) -> Setting:
    """Return what a run's plan depends on beside its tables; its data are looked at.

    Args:
        configs: the tables.
        parallel: what the user asked for.
        dataset: whose training samples tell what batches ask for.
        machine: where the ranks run.
        ranks: number of processes.
        ranks_per_node: of them on one machine.
        global_batch_size: samples per step, over all ranks.
    """
    return Setting(
        machine=machine,
        usage=measure_usage(dataset, configs, global_batch_size),
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        exchange_bytes=EXCHANGE_BYTES[parallel.exchange],
    )


def plan_run(
    configs: Sequence[TableConfig],
    parallel: ParallelConfig,
    setting: Setting,
    *,
    memory_flag: str = "--parallel.memory",
) -> ShardingPlan:
    """Plan the tables of a run; equal arguments give equal plans, so that ranks need not talk about it.

    Args:
        configs: the tables.
        parallel: what the user asked for.
        setting: ranks, machine, whose memory must be the same on all ranks, and what a batch asks for.
        memory_flag: by which the user says how much that is.

    Raises:
        ValueError: the tables do not fit, or a flag does not; its message names the flag.
    """
    try:
        return plan_tables(
            configs,
            ranks=setting.ranks,
            ranks_per_node=setting.ranks_per_node,
            statistics=setting.usage,
            machine=setting.machine,
            sharding=parallel.sharding,
            fixed=parse_fixed(parallel.tables, [config.name for config in configs]),
            replicate_below_rows=parallel.replicate_below_rows,
            exchange_bytes=setting.exchange_bytes,
        )
    except DoesNotFitError as error:
        raise ValueError(f"{error.problem}; {_name_cure(error.remedies, setting, memory_flag)}") from error


def limit_memory(machine: Machine, parallel: ParallelConfig, own_bytes: int, host_bytes: int) -> Machine:
    """Return a machine with what tables may take of a rank's memory: what ``--parallel.memory`` says, or all there is.

    Args:
        machine: where the ranks run.
        parallel: what the user asked for.
        own_bytes: of the device.
        host_bytes: of a GPU's host, or of the CPU once more.
    """
    if parallel.memory is not None:
        own_bytes = host_bytes = parse_bytes(parallel.memory, "--parallel.memory")
    return replace(machine, memory_bytes=own_bytes, host_memory_bytes=host_bytes)


def parse_fixed(entries: Sequence[str], names: Sequence[str]) -> dict[str, Sharding]:
    """Read ``--parallel.tables NAME=KIND ...``.

    Raises:
        ValueError: an entry has another form, or its table or kind does not exist.
    """
    fixed: dict[str, Sharding] = {}
    for entry in entries:
        name, _, kind = entry.rpartition("=")  # a table's name may hold one
        known = next((sharding for sharding in SHARDINGS if sharding == kind), None)
        if not name or known is None:
            raise ValueError(f"--parallel.tables: expected NAME=KIND with one of {', '.join(SHARDINGS)}, got '{entry}'")
        if name not in names:
            raise ValueError(f"--parallel.tables: expected one of the tables {name_choices(name, names)}, got '{name}'")
        if fixed.setdefault(name, known) != known:
            raise ValueError(f"--parallel.tables: expected one kind for table '{name}', got {fixed[name]} and {kind}")
    return fixed


def parse_bytes(text: str, flag: str) -> int:
    """Read a size such as 80GB (10^9 bytes) or 80GiB (2^30); a number alone could mean either, or bytes.

    Raises:
        ValueError: naming the flag.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < MOST_BYTES:
        raise ValueError(f"{flag}: expected a size with its unit, such as 80GB or 80GiB, got '{text}'")
    return int(float(match[1]) * unit)


def memory_for_tables(device: str, ranks_per_node: int) -> int:
    """Return the bytes of this machine that a rank may fill with rows.

    On a CPU half of its share, as a checkpoint takes a copy; on a GPU what activations leave.
    """
    if device == "cuda":
        import torch

        return int(GPU_SHARE * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return memory_bytes() // (2 * ranks_per_node)


def _name_cure(remedies: Remedies, setting: Setting, memory_flag: str) -> str:
    """Say which flag, alone, would make tables fit."""
    cures = []
    if remedies.auto:
        flags = f"--parallel.sharding auto and no --parallel.tables for {', '.join(remedies.auto[:SHOWN_TABLES])}"
        cures.append(flags + (" ..." if len(remedies.auto) > SHOWN_TABLES else ""))
    if remedies.ranks is not None:
        cures.append(f"--ranks {remedies.ranks} ({setting.ranks_per_node} per machine)")
    if remedies.memory_bytes is not None:
        cures.append(
            f"{memory_flag} {format_bytes(remedies.memory_bytes, up=True).replace(' bytes', 'B').replace(' ', '')}"
        )
    if remedies.memory is not None:
        cures.append(f"--tables.memory {remedies.memory}")
    if remedies.row_type is not None:
        cures.append(f"--tables.row-type {remedies.row_type}")
    if remedies.optimizer is not None:
        cures.append(f"--tables.optimizer {OPTIMIZERS[remedies.optimizer]}")
    if remedies.dim is not None:
        cures.append(f"--model.dim {remedies.dim}")
    if remedies.replicate_below_rows is not None:
        cures.append(f"--parallel.replicate-below-rows {remedies.replicate_below_rows}")
    if not cures:
        return "no single flag would make them fit; prepare the data with fewer rows (num_rows, min_count)"
    return f"would fit with {'; or '.join(cures)}"
