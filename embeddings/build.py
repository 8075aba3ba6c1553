"""Makes tables: chooses the kernel that fits the device, and imports only that one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from embeddings.interface import Tables
from embeddings.shards import EXCHANGE_BYTES, Exchange, ShardingPlan
from embeddings.tables import TableConfig

if TYPE_CHECKING:
    from embeddings.sharded.sequence_tables import SequenceTables

Kernel = Literal["auto", "numba", "fbgemm"]


def build_tables(
    configs: Sequence[TableConfig],
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kernel: Kernel = "auto",
    plan: ShardingPlan | None = None,
    exchange: Exchange = "fp32",
) -> Tables:
    """Builds tables, whole or this rank's shards; equal seeds give equal rows with every kernel, device and plan.

    Args:
        configs: The tables; pooled features come out in this order.
        device: Where the rows live.
        seed: Rows start as a function of the seed and the table's name.
        kernel: ``"numba"``: our own kernels, CPU only. ``"fbgemm"``: fbgemm's fused tables, CPU or CUDA.
            ``"auto"``: numba on the CPU, fbgemm elsewhere.
        plan: What lies on which rank of ``torch.distributed``'s default group, which must be running; None, or a plan
            of one rank, keeps every table whole in this process.
        exchange: Type in which rows and gradients travel between ranks.

    Raises:
        ValueError: When the kernel does not run on the device, or cannot do what a table asks for.
    """
    device = torch.device(device)
    if kernel not in ("auto", "numba", "fbgemm"):
        raise ValueError(f"kernel: expected 'auto', 'numba' or 'fbgemm', got {kernel!r}")
    if exchange not in EXCHANGE_BYTES:
        raise ValueError(f"exchange: expected 'fp32', 'fp16' or 'bf16', got {exchange!r}")
    if kernel == "numba" and device.type != "cpu":
        raise ValueError(f"kernel 'numba': expected device 'cpu', got {str(device)!r}; use kernel 'fbgemm' there")
    if plan is not None:
        plan.check(configs)
    is_sharded = plan is not None and plan.ranks > 1
    # Imported where used: each kernel takes a second to load, and only one is.
    if kernel == "numba" or (kernel == "auto" and device.type == "cpu"):
        _check_memory(configs)
        if plan is not None and is_sharded:
            from embeddings.sharded.sharded_tables import ShardedTables

            return ShardedTables(configs, plan=plan, seed=seed, exchange=exchange)
        from embeddings.local.local_tables import LocalTables

        return LocalTables(configs, seed=seed)
    if plan is not None and is_sharded:
        from embeddings.fbgemm.torchrec_tables import TorchrecTables

        return TorchrecTables(configs, plan=plan, device=device, seed=seed, exchange=exchange)
    from embeddings.fbgemm.fbgemm_tables import FbgemmTables

    return FbgemmTables(configs, device=device, seed=seed)


def build_sequence_tables(
    configs: Sequence[TableConfig],
    *,
    seed: int = 0,
    plan: ShardingPlan | None = None,
    exchange: Exchange = "fp32",
) -> SequenceTables:
    """Builds tables that give a vector for each id, on the CPU; the arguments are those of ``build_tables``."""
    from embeddings.sharded.sequence_tables import SequenceTables

    _check_memory(configs)
    return SequenceTables(configs, plan=plan, seed=seed, exchange=exchange)


def _check_memory(configs: Sequence[TableConfig]) -> None:
    for config in configs:
        if config.memory != "device":
            raise ValueError(f"table {config.name!r}: expected memory 'device' on the CPU, got {config.memory!r}")
