"""How fast do ranks train together, against torchrec's on the same shapes, and against one process of our own?

The network is that of `train_step` with the same global batch of 4,096; every process has one thread. On each rank,
ours and torchrec's `DistributedModelParallel` (fbgemm's tables, fused row-wise Adagrad) take turns in one run, table-
wise and row-wise; in turns of its own, rank 0 trains the whole batch alone while the others wait. Each figure is the
median of its turns on rank 0, each turn begins when all ranks are ready; each ratio is one of samples per second.

`bytes_sent` is what rank 0's tables have sent in a step, counted where it is handed over; `bytes_expected` is the same
from the plan and the batch alone. A key without a kind of sharding is the lower of the ratios, or the sum of the bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.click_networks import Ids
    from embeddings.sharded.sharded_tables import ShardedTables
    from embeddings.shards import Sharding, ShardingPlan

KINDS: tuple[Sharding, ...] = ("table_wise", "row_wise")
BATCHES = 4
WARM_UP = 2


def main() -> None:
    """Start the ranks, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each network that are measured")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--multi-hot", action="store_true", help="1 to 32 ids per bag, 8 on average, instead of one")
    parser.add_argument("--exchange", choices=["fp32", "fp16", "bf16"], default="fp32", help="of ours")
    arguments = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        result = _measure(arguments)
        if os.environ["RANK"] == "0":
            print(json.dumps({name: round(figure, 4) for name, figure in result.items()}), flush=True)
        return
    # One busy neighbour makes spinning threads several times slower; torch reads these when it is imported.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "99", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    command = [sys.executable, *launcher, "-m", "benchmarks.ranks", *sys.argv[1:]]
    child = subprocess.run(command, env=os.environ | defaults, stdout=subprocess.PIPE, text=True, check=True)
    print(child.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from benchmarks.click_networks import BATCH_SIZE, draw_batches
    from benchmarks.rank_networks import build_ours, build_torchrec, describe_tables, take_share
    from embeddings.allocation import keep_freed_memory
    from embeddings.shards import ShardingPlan, place

    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = draw_batches(BATCHES, multi_hot=arguments.multi_hot)
    shares = [take_share(batch, rank, ranks) for batch in whole]
    steps: dict[str, Callable[[int], float]] = {}
    result: dict[str, float] = {"ranks": ranks}
    for kind in KINDS:
        placed = [
            place(config, kind, [number % ranks] if kind == "table_wise" else range(ranks))
            for number, config in enumerate(describe_tables())
        ]
        plan = ShardingPlan(ranks=ranks, ranks_per_node=ranks, tables=tuple(placed))
        steps[f"ours_{kind}"], tables = build_ours(shares, plan, arguments.exchange)
        counts = _count_bytes(tables, plan, whole[0], arguments.exchange)
        result |= {f"{kind}_{name}": count for name, count in counts.items()}
        steps[f"torchrec_{kind}"] = build_torchrec(shares, kind)
    if rank == 0:
        steps["one_process"] = build_ours(whole, None)[0]
    medians = _take_turns(steps, arguments.rounds)
    for name, ms in medians.items():
        result[f"{name}_ms"] = ms
        result[f"{name}_samples_per_second"] = BATCH_SIZE / ms * 1e3
        if rank == 0:
            print(f"  {name:20} {ms:7.1f} ms", file=sys.stderr)
    if rank == 0:
        for kind in KINDS:
            result[f"{kind}_vs_torchrec"] = medians[f"torchrec_{kind}"] / medians[f"ours_{kind}"]
            result[f"{kind}_vs_one_process"] = medians["one_process"] / medians[f"ours_{kind}"]
        for key in ("vs_torchrec", "vs_one_process"):
            result[key] = min(result[f"{kind}_{key}"] for kind in KINDS)
        for key in ("bytes_sent", "bytes_expected"):
            result[key] = sum(result[f"{kind}_{key}"] for kind in KINDS)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _take_turns(steps: dict[str, Callable[[int], float]], rounds: int) -> dict[str, float]:
    import torch.distributed as dist

    names = [f"{who}_{kind}" for kind in KINDS for who in ("ours", "torchrec")] + ["one_process"]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + WARM_UP):
        for name in names:
            step = steps.get(name)
            if step is not None:  # what the others left in the caches is paid for by a step that is not measured
                step(2 * number)
            dist.barrier()
            start = time.perf_counter()
            if step is not None:
                step(2 * number + 1)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
            dist.barrier()
    return {name: statistics.median(its) * 1e3 for name, its in seconds.items()}


def _count_bytes(tables: ShardedTables, plan: ShardingPlan, batch: Ids, exchange: str) -> dict[str, float]:
    """Look the batch up and update its rows once; return what this rank has sent for it, and what it should have."""
    import torch.distributed as dist

    from benchmarks.click_networks import NAMES
    from benchmarks.rank_networks import describe_tables, take_share
    from embeddings.sharded.exchanged_bytes import expected_bytes

    shares = [take_share(batch, rank, plan.ranks) for rank in range(plan.ranks)]
    before: int = sum(tables.bytes_sent.values())
    tables(shares[dist.get_rank()].keyed()).values().mean().backward()
    sent = sum(tables.bytes_sent.values()) - before
    batches = []
    for share in shares:
        lengths = share.lengths.view(len(NAMES), -1).numpy()
        ids = share.values.split(lengths.sum(axis=1).tolist())
        batches.append({name: (own.numpy(), counts) for name, own, counts in zip(NAMES, ids, lengths, strict=True)})
    expected = expected_bytes(describe_tables(), plan, batches, exchange=exchange)[dist.get_rank()]
    return {"bytes_sent": sent, "bytes_expected": sum(expected.values())}


if __name__ == "__main__":
    main()
