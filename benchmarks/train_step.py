"""How many samples per second does one process train, against the same network written plainly and torchrec's own?

Batch 4,096; bottom MLP 13-256-128-64, all pairs' dot products, top MLP 256-128-1; 26 tables of 100,000 rows x 64 with
uniform ids, (one-hot) one per bag and (multi-hot) 1 to 32, 8 on average. The three take turns on the same batches in
one process; each figure is the median of its turns, each ratio is one of samples per second. Ours and torchrec's update
rows by row-wise Adagrad; the plain one (`nn.EmbeddingBag(sparse=True)`) by SGD, which is less work. Dense weights are
updated by SGD in all three. Ours is the product's step, guards included. Memory that is freed is kept for all three
(`embeddings.allocation`), without which the plain one and torchrec's are slower.

The floor is the MLPs' bare matrix products plus the bytes that must move at the speed of a copy; the interaction's
arithmetic is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

THREADS = (1, 2)
BATCHES = 4


def main() -> None:
    """Measure each number of threads in a process of its own, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each network that are measured")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS))
    parser.add_argument("--child", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_measure(arguments.child, arguments.rounds)))
        return
    result: dict[str, float] = {}
    for threads in arguments.threads:
        # One busy neighbour makes spinning threads several times slower; torch reads this when it is imported.
        defaults = {"OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "99"}
        environment = defaults | os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.train_step", "--child", str(threads)]
        child = subprocess.run(
            [*command, "--rounds", str(arguments.rounds)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        suffix = "" if threads == 1 else f"_{threads}_threads"
        result |= {name + suffix: figure for name, figure in json.loads(child.stdout.splitlines()[-1]).items()}
    print(json.dumps(result))


def _measure(threads: int, rounds: int) -> dict[str, float]:
    import torch

    from benchmarks.click_networks import BATCH_SIZE, build_steps, draw_batches
    from benchmarks.step_floor import COPIED_BYTES, build_copy, build_products, moved_bytes
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()
    result: dict[str, float] = {}
    for kind in ("one_hot", "multi_hot"):
        batches = draw_batches(BATCHES, multi_hot=kind == "multi_hot")
        steps = dict(build_steps(batches))
        floor = {"products": build_products(), "copy": build_copy()}
        medians = _take_turns(steps | floor, rounds)
        products_ms, copy_ms = (medians.pop(name) for name in floor)
        moved_ms = moved_bytes(batches[0].values.numel()) / (2 * COPIED_BYTES) * copy_ms
        ours_ms = medians["ours"]
        result |= {f"{kind}_vs_{name}": medians[name] / ours_ms for name in ("plain", "torchrec")}
        result |= {f"{kind}_floor_share": (products_ms + moved_ms) / ours_ms}
        result |= {f"{kind}_products_ms": products_ms, f"{kind}_moved_bytes_ms": moved_ms}
        result |= {f"{kind}_{name}_ms": ms for name, ms in medians.items()}
        result |= {f"{kind}_{name}_samples_per_second": BATCH_SIZE / ms * 1e3 for name, ms in medians.items()}
        medians |= {"products": products_ms, "bytes": moved_ms}
        print(f"\n{kind}, threads: {threads}", file=sys.stderr)
        for name, ms in medians.items():
            print(f"  {name:9} {ms:7.1f} ms   {ms / ours_ms:5.2f} of ours", file=sys.stderr)
        for name, step in steps.items():
            _print_stages(name, step)
    return {name: round(figure, 4) for name, figure in result.items()}


def _take_turns(steps: dict[str, Any], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            # What the others left in the caches is paid for by a step that is not measured.
            step(2 * number)
            start = time.perf_counter()
            step(2 * number + 1)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(its) * 1e3 for name, its in seconds.items()}


def _print_stages(name: str, step: Any) -> None:
    from torch.profiler import ProfilerActivity, profile

    steps = 4
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for number in range(steps):
            step(number)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total_ms = sum(event.self_cpu_time_total for event in events) / steps / 1e3
    print(f"  where {name}'s {total_ms:.0f} ms go:", file=sys.stderr)
    for event in events[:8]:
        print(f"    {event.self_cpu_time_total / steps / 1e3:7.1f} ms  {event.key[:70]}", file=sys.stderr)


if __name__ == "__main__":
    main()
