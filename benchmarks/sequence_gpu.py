"""How much faster than all cores of the CPU does a GPU train MCLRec, its two-step form and SASRec, and rank?

The settings of the recipe `mclrec-beauty`, on the sequences of `--data`. Whole steps of the loop are timed, with
reading and copying: the median over `--turns` turns of `--batches` batches, which forms and devices take
alternately after a warm-up. `_speedup` is the CPU's time over the GPU's. Rows are the CPU's on both; see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.mclrec import FORMS, build

if TYPE_CHECKING:
    from dlrm.training.trainer import Trainer


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="sequences, as `recforge train` takes them; none are generated ones")
    parser.add_argument("--devices", nargs="*", default=["cpu", "cuda"])
    parser.add_argument("--batches", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    import torch

    from contrastive.data.provide_sequences import provide_sequences
    from contrastive.recipes import RECIPES

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = RECIPES["mclrec-beauty"].config
    dataset = provide_sequences(config.schema, arguments.data, is_synthetic=True)
    cases = list(itertools.product(FORMS, arguments.devices))
    with tempfile.TemporaryDirectory() as folder:
        trainers = {case: build(case[0], config, dataset, Path(folder) / "-".join(case), case[1]) for case in cases}
        steps = {case: step_of(trainer) for case, trainer in trainers.items()}
        milliseconds = {case: 1000 * each for case, each in take_turns(steps, arguments).items()}
    figures = {f"{form}_{device}_ms": each for (form, device), each in milliseconds.items()}
    if {"cpu", "cuda"} <= set(arguments.devices):
        figures |= {f"{form}_speedup": milliseconds[form, "cpu"] / milliseconds[form, "cuda"] for form in FORMS}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def step_of(trainer: Trainer) -> Callable[[], None]:
    """Return what trains on the next batch, as the loop does; it waits for the loss."""
    from dlrm.training.look_ahead import look_ahead

    batches = look_ahead(trainer.read(), trainer.device, trainer.stopwatch)
    trainer.model.train()
    samples = 0

    def step() -> None:
        nonlocal samples
        batch, following = next(batches)
        samples += len(batch)
        trainer.step(batch, samples, following=following)

    return step


def take_turns(
    steps: dict[tuple[str, str], Callable[[], None]], arguments: argparse.Namespace
) -> dict[tuple[str, str], float]:
    """Return the seconds of a batch."""
    found: dict[tuple[str, str], list[float]] = {case: [] for case in steps}
    for turn in range(arguments.turns + 1):
        for case, step in steps.items():
            begun = time.perf_counter()
            for _ in range(arguments.batches):
                step()
            if turn:  # the first one compiles
                found[case].append((time.perf_counter() - begun) / arguments.batches)
    return {case: statistics.median(each) for case, each in found.items()}


if __name__ == "__main__":
    main()
