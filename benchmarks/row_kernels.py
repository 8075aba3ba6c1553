"""How fast are rows looked up, pooled and updated, against fbgemm's CPU tables, each other and their floor in bytes?

One thread, 26 tables of 100,000 rows x 64 with uniform ids, 4,096 bags of one id (no prefix) and of 1 to 32, 8 on
average (`many_`). A turn is forward and backward: bags pooled by sum, then each touched row updated once. The two of a
pair take turns on the same batches; a ratio is the median over neighbouring turns, a time the median of its own. Times
are the processor's, of this process: a busy neighbour takes turns away, but is not counted. Ours is `LocalTables`,
reading and checking of the batch included; fbgemm is its bare operator, which is handed its offsets. Memory that is
freed is kept for both (`embeddings.allocation`).

The floor is the bytes that must be read and written once, counted from the distinct rows of the batches: pooled
vectors and their gradients at the speed of a copy, rows and optimizers' states at that of rows which are read and
written in place in random order, both measured in the run. For `_linear_floor_share` rows move as fast as a copy, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.row_floor import Moved
    from embeddings import TableConfig

BATCHES = 4
WARM_UP = 2
LEARNING_RATE = 0.01
LONGEST_BAG = 32
BAG_END_PROBABILITY = 0.1231  # bags are min(geometric, 32) ids long: 8.0 on average

Turn = Callable[[int], tuple[float, float]]  # of a batch's number: seconds of forward, of backward

PAIRS = {
    "rowwise_adagrad_vs_fbgemm": ("fbgemm_rowwise_adagrad", "rowwise_adagrad"),
    "sgd_vs_fbgemm": ("fbgemm_sgd", "sgd"),
    "adagrad_vs_rowwise_adagrad": ("adagrad", "rowwise_adagrad"),
    "adam_vs_rowwise_adagrad": ("adam", "rowwise_adagrad"),
    "row_lamb_vs_rowwise_adagrad": ("row_lamb", "rowwise_adagrad"),
    "partial_row_lamb_vs_rowwise_adagrad": ("partial_row_lamb", "rowwise_adagrad"),
    "lazy_cowclip_vs_adam": ("lazy_cowclip", "adam"),
    "bf16_vs_rowwise_adagrad": ("rowwise_adagrad_bf16", "rowwise_adagrad"),
    "fp16_vs_rowwise_adagrad": ("rowwise_adagrad_fp16", "rowwise_adagrad"),
}
"""Each ratio is the first one's time over the second one's."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large tables and batches are."""

    tables: int = 26
    rows: int = 100_000
    dim: int = 64
    bags: int = 4096
    bandwidth_bytes: int = 256 << 20

    def names(self) -> list[str]:
        """Name the tables."""
        return [f"C{number + 1}" for number in range(self.tables)]


SMALL = Shape(tables=3, rows=1000, bags=64, bandwidth_bytes=1 << 20)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Ids, bags' lengths and offsets, and a gradient for all."""

    shape: Shape
    values: Sequence[Tensor]
    lengths: Sequence[Tensor]
    offsets: Sequence[Tensor]
    gradient: Tensor

    def distinct_rows(self) -> int:
        """Count the rows that a batch names, on average."""
        count, shape = 0, self.shape
        for values, lengths in zip(self.values, self.lengths, strict=True):
            per_table = lengths.view(shape.tables, -1).sum(dim=1).tolist()
            count += sum(part.unique().numel() for part in values.split(per_table))
        return count // len(self.values)


def main() -> None:
    """Measure all pairs, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each pair that are measured")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--small", action="store_true", help="tables of nearly nothing, to see that it runs")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    result = measure(SMALL if arguments.small else Shape(), arguments.pairs, arguments.rounds)
    print(json.dumps({name: round(figure, 4) for name, figure in result.items()}))


def measure(shape: Shape, pairs: Sequence[str], rounds: int) -> dict[str, float]:
    """Measure pairs, one after the other, with one id per bag and with many."""
    import torch

    from benchmarks.row_floor import floor_seconds, measure_bandwidth
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    bandwidth = measure_bandwidth(shape.bandwidth_bytes, shape.dim, rounds)
    result: dict[str, float] = {
        "linear_gigabytes_per_second": bandwidth.linear / 1e9,
        "random_gigabytes_per_second": bandwidth.random / 1e9,
    }
    print("  ".join(f"{name}: {figure:.1f}" for name, figure in result.items()), file=sys.stderr)
    for prefix, has_many in (("", False), ("many_", True)):
        batches = draw_batches(shape, has_many=has_many)
        distinct = batches.distinct_rows()
        result[f"{prefix}distinct_rows"] = distinct
        for pair in pairs:
            ratio, seconds = _take_turns(PAIRS[pair], batches, rounds)
            result[prefix + pair] = ratio
            for name, (forward, backward) in seconds.items():
                whole = forward + backward
                result[f"{prefix}{name}_ms"] = whole * 1e3
                result[f"{prefix}{name}_forward_ms"] = forward * 1e3
                bytes_moved = _moved(name, shape, distinct)
                result[f"{prefix}{name}_floor_share"] = floor_seconds(bytes_moved, bandwidth) / whole
                linear = floor_seconds(bytes_moved, bandwidth, rows_are_linear=True)
                result[f"{prefix}{name}_linear_floor_share"] = linear / whole
            _print_pair(prefix + pair, ratio, seconds)
    return result


def draw_batches(shape: Shape, *, has_many: bool) -> Batches:
    """Draw uniform ids, the kindest to nobody's cache: one per bag, or 1 to 32."""
    import numpy as np
    import torch

    random = np.random.default_rng(0)
    all_bags = shape.tables * shape.bags
    values, lengths = [], []
    for _ in range(BATCHES):
        counts = np.ones(all_bags, dtype=np.int64)
        if has_many:
            counts = np.minimum(random.geometric(BAG_END_PROBABILITY, all_bags), LONGEST_BAG)
        lengths.append(torch.from_numpy(counts))
        values.append(torch.from_numpy(random.integers(0, shape.rows, int(counts.sum()))))
    return Batches(
        shape=shape,
        values=values,
        lengths=lengths,
        offsets=[torch.cat([counts.new_zeros(1), counts.cumsum(0)]) for counts in lengths],
        # In torch's own memory, as training has it: that begins a cache line, and numpy's mostly does not.
        gradient=torch.randn(shape.bags, shape.tables * shape.dim, generator=torch.Generator().manual_seed(0)),
    )


def _take_turns(names: tuple[str, str], batches: Batches, rounds: int) -> tuple[float, dict[str, tuple[float, float]]]:
    turns = {name: _build(name, batches) for name in names}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + WARM_UP):
        for name, turn in turns.items():
            # What the other left in the caches is paid for by a turn that is not measured.
            turn(2 * number)
            its = turn(2 * number + 1)
            if number >= WARM_UP:
                seconds[name].append(its)
    del turns, turn
    gc.collect()
    above, below = ([sum(its) for its in seconds[name]] for name in names)
    ratio = statistics.median(one / other for one, other in zip(above, below, strict=True))
    medians = {}
    for name, both in seconds.items():
        medians[name] = statistics.median(forward for forward, _ in both), statistics.median(back for _, back in both)
    return ratio, medians


def _build(name: str, batches: Batches) -> Turn:
    return _build_fbgemm(name, batches) if name.startswith("fbgemm_") else _build_ours(name, batches)


def _describe(name: str, shape: Shape) -> list[TableConfig]:
    from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowSGD, RowWiseAdagrad, TableConfig

    optimizers: dict[str, Any] = {
        "sgd": RowSGD(learning_rate=LEARNING_RATE),
        "adagrad": RowAdagrad(learning_rate=LEARNING_RATE),
        "rowwise_adagrad": RowWiseAdagrad(learning_rate=LEARNING_RATE),
        "adam": RowAdam(learning_rate=LEARNING_RATE),
        "row_lamb": RowLamb(learning_rate=LEARNING_RATE),
        "partial_row_lamb": RowLamb(learning_rate=LEARNING_RATE, partial=True),
        "lazy_cowclip": RowCowClip(learning_rate=LEARNING_RATE, l2=1e-5, l2_mode="lazy"),
    }
    row_type: Any = name.rpartition("_")[2] if name.endswith(("_bf16", "_fp16")) else "fp32"
    optimizer = optimizers[name.removeprefix("fbgemm_").removesuffix(f"_{row_type}")]
    return [
        TableConfig(name=table, num_rows=shape.rows, dim=shape.dim, optimizer=optimizer, row_type=row_type)
        for table in shape.names()
    ]


def _moved(name: str, shape: Shape, distinct_rows: int) -> Moved:
    from benchmarks.row_floor import moved
    from embeddings.local.row_updates import make_state

    config = _describe(name, shape)[0]
    return moved(
        distinct_rows=distinct_rows,
        vectors=shape.bags * shape.tables,
        dim=shape.dim,
        row_bytes=4 if config.row_type == "fp32" else 2,
        state_numbers=sum(tensor.numel() for tensor in make_state(config, 1, shape.dim).values() if tensor.dim()),
    )


def _build_ours(name: str, batches: Batches) -> Turn:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from embeddings.local.local_tables import LocalTables

    tables, names = LocalTables(_describe(name, batches.shape)), batches.shape.names()

    def turn(number: int) -> tuple[float, float]:
        place = number % BATCHES
        start = time.process_time()
        # Anew each time, as a reader would, because it remembers its offsets.
        keyed = KeyedJaggedTensor(keys=names, values=batches.values[place], lengths=batches.lengths[place])
        pooled = tables(keyed).values()
        return _finish(pooled, batches.gradient, start)

    return turn


def _build_fbgemm(name: str, batches: Batches) -> Turn:
    import torch

    from embeddings.fbgemm.fbgemm_tables import make_kernel

    configs = _describe(name, batches.shape)
    kernel = make_kernel(configs, list(range(len(configs))), torch.device("cpu"))
    for weight in kernel.split_embedding_weights():
        weight.uniform_(-0.003, 0.003)

    def turn(number: int) -> tuple[float, float]:
        place = number % BATCHES
        start = time.process_time()
        return _finish(kernel(batches.values[place], batches.offsets[place]), batches.gradient, start)

    return turn


def _finish(pooled: Tensor, gradient: Tensor, start: float) -> tuple[float, float]:
    middle = time.process_time()
    pooled.backward(gradient)
    return middle - start, time.process_time() - middle


def _print_pair(pair: str, ratio: float, seconds: dict[str, tuple[float, float]]) -> None:
    print(f"{pair}: {ratio:.2f}", file=sys.stderr)
    for name, (forward, backward) in seconds.items():
        print(f"  {name:24} {forward * 1e3:7.1f} + {backward * 1e3:6.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
