"""How fast one rank copies, multiplies, looks rows up and updates them, while all ranks of the machine do the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.distributed.ranks import Ranks
from dlrm.planning.findings import BAGS, COPY_NUMBERS, DIMS, ROWS, SAMPLES, TABLES, WIDTH, Rates, quiet_seconds
from embeddings import RowWiseAdagrad, TableConfig
from embeddings.build import build_tables

TIMES = 16
SMALL_TABLES = 64


def measure_rates(ranks: Ranks) -> Rates:
    """Measure this rank, while the others measure themselves (a collective call)."""
    source, target = torch.ones(COPY_NUMBERS), torch.ones(COPY_NUMBERS)
    left, right = torch.ones(SAMPLES, WIDTH), torch.ones(WIDTH, WIDTH)
    product = torch.empty(SAMPLES, WIDTH)
    rows = [_measure_rows(ranks, tables=TABLES, num_rows=ROWS, dim=dim, bags=BAGS) for dim in DIMS]
    return Rates(
        copy=_time(ranks, lambda: target.copy_(source)),
        product=_time(ranks, lambda: torch.mm(left, right, out=product)),
        lookups=tuple(lookup for lookup, _ in rows),
        updates=tuple(update for _, update in rows),
        shard=sum(_measure_rows(ranks, tables=SMALL_TABLES, num_rows=16, dim=16, bags=1)) / SMALL_TABLES,
    )


def _measure_rows(ranks: Ranks, *, tables: int, num_rows: int, dim: int, bags: int) -> tuple[float, float]:
    """Return the seconds of looking up and of updating."""
    optimizer = RowWiseAdagrad(learning_rate=0.01)
    configs = [TableConfig(name=f"t{i}", num_rows=num_rows, dim=dim, optimizer=optimizer) for i in range(tables)]
    rows = build_tables(configs)
    generator = torch.Generator().manual_seed(ranks.rank)
    names = [config.name for config in configs]
    ids = [torch.randint(num_rows, (tables * bags,), generator=generator) for _ in range(TIMES + 2)]
    gradient = torch.ones(bags, tables * dim)
    lookups, updates = [], []
    for values in ids:
        features = KeyedJaggedTensor(keys=names, values=values, lengths=torch.ones(tables * bags, dtype=torch.int32))
        ranks.barrier()
        start = time.perf_counter()
        pooled: Tensor = rows(features).values()
        middle = time.perf_counter()
        pooled.backward(gradient)
        lookups.append(middle - start)
        updates.append(time.perf_counter() - middle)
    return quiet_seconds(lookups[2:]), quiet_seconds(updates[2:])


def _time(ranks: Ranks, call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(TIMES + 2):
        ranks.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return quiet_seconds(seconds[2:])
