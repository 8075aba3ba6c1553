"""One rank of a measurement: links, arithmetic, rows and a short training; started by `dlrm.planning.calibration`."""

from __future__ import annotations

import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlrm.data.dataset import Dataset
from dlrm.data.reader import Reader
from dlrm.distributed.parallelize import DenseReducer
from dlrm.distributed.ranks import Ranks
from dlrm.model import build_dlrm
from dlrm.optim.dense import build_dense_optimizer
from dlrm.planning.findings import TINY_BATCH, Findings, ProbeTask, quiet_seconds
from dlrm.planning.rates import measure_rates
from dlrm.training.train_step import ClickTask, TrainStep
from embeddings.allocation import keep_freed_memory

LINK_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22)
LINK_TIMES = 24
WARMUP_STEPS, MOST_STEPS, STEPS_SECONDS = 4, 120, 3.0
TIMEOUT = timedelta(seconds=120)


def main(argv: Sequence[str]) -> None:
    """Measure as rank ``argv[1]`` what the file ``argv[0]`` says."""
    task: ProbeTask = pickle.loads(Path(argv[0]).read_bytes())
    ranks = Ranks(rank=int(argv[1]), count=task.ranks, per_node=task.ranks)
    torch.set_num_threads(1)
    keep_freed_memory()
    if task.ranks > 1:
        meeting = f"file://{task.folder / 'store'}"
        dist.init_process_group("gloo", meeting, rank=ranks.rank, world_size=task.ranks, timeout=TIMEOUT)
    single = task.ranks == 1 or task.steps_only
    links = ((), ()) if single else (_measure_all_to_all(ranks), _measure_all_reduce())
    steps = _measure_steps(task, ranks, task.run.step.global_batch_size)
    findings = Findings(
        rates=None if task.steps_only else measure_rates(ranks),
        all_to_all=links[0],
        all_reduce=links[1],
        step=quiet_seconds(steps),
        median_step=statistics.median(steps),
        tiny_step=quiet_seconds(_measure_steps(task, ranks, TINY_BATCH)) if task.ranks == 1 else 0.0,
    )
    if ranks.is_first:
        (task.folder / "findings.pickle").write_bytes(pickle.dumps(findings))
    ranks.barrier()


def _measure_all_to_all(ranks: Ranks) -> tuple[tuple[int, float], ...]:
    def exchange(size: int) -> Callable[[], Any]:
        sent, received = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        return lambda: dist.all_to_all_single(received, sent)

    return tuple((size, _time(exchange(size))) for size in LINK_BYTES if size % ranks.count == 0)


def _measure_all_reduce() -> tuple[tuple[int, float], ...]:
    def reduce(size: int) -> Callable[[], Any]:
        numbers = torch.zeros(size // 4)
        return lambda: dist.all_reduce(numbers)

    return tuple((size, _time(reduce(size))) for size in LINK_BYTES)


def _time(call: Callable[[], Any]) -> float:
    """Return the time of a collective call, on the rank that speaks for all."""
    seconds = []
    for _ in range(LINK_TIMES + 2):
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return quiet_seconds(seconds[2:])


def _measure_steps(task: ProbeTask, ranks: Ranks, global_batch_size: int) -> list[float]:
    """Train the product's step for a while on batches that are in memory already; return the steps' times."""
    dataset = Dataset(task.dataset)
    run = task.run
    model = build_dlrm(
        dataset.info,
        run.model,
        run.tables,
        run.small_tables,
        seed=0,
        device="cpu",
        plan=task.plan,
        exchange=run.parallel.exchange,
    ).train()
    optimizer = build_dense_optimizer(run.dense, model, run.head)
    step = TrainStep(
        ClickTask(model),
        optimizer,
        numeric_names=dataset.info.numeric,
        reducer=DenseReducer(model.parameters(), ranks) if ranks.count > 1 else None,
    )
    reader = Reader(dataset, "train", shuffle=run.shuffle)
    size = min(global_batch_size, reader.num_rows)
    count = max(1, min(MOST_STEPS, reader.num_rows // size, (1 << 18) // size))
    share = ranks.share_of if ranks.count > 1 else None
    batches = list(islice(reader.batches(size, share=share), count))
    seconds: list[float] = []
    for number, (batch, following) in enumerate(islice(pairwise(cycle(batches)), WARMUP_STEPS + MOST_STEPS)):
        start = time.perf_counter()
        step(batch, (number + 1) * size, following=following if following is not batch else None)
        seconds.append(time.perf_counter() - start)
        # All ranks must agree when it is enough.
        if number >= 2 * WARMUP_STEPS and ranks.sum([sum(seconds)])[0] / ranks.count > STEPS_SECONDS:
            break
    return seconds[WARMUP_STEPS:]


if __name__ == "__main__":
    main(sys.argv[1:])
