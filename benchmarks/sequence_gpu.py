"""How much faster than all cores of the CPU does a GPU train MCLRec, its two-step form and SASRec?

The settings of the recipe `mclrec-beauty`, on the sequences of `--data`. Whole steps of the loop are timed, with
reading and copying: the median over `--turns` turns of `--batches` batches, which forms and devices take
alternately after a warm-up. `_speedup` is the CPU's time over the GPU's. Rows are the CPU's on both; see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.mclrec import FORMS, build, take_turns

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
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            f"{form}_{device}_ms": step_of(build(form, config, dataset, Path(folder) / f"{form}-{device}", device))
            for form, device in itertools.product(FORMS, arguments.devices)
        }
        seconds = take_turns(steps, arguments.batches, arguments.turns, time.perf_counter)
    figures = {name: 1000 * each for name, each in seconds.items()}
    if {"cpu", "cuda"} <= set(arguments.devices):
        figures |= {f"{form}_speedup": figures[f"{form}_cpu_ms"] / figures[f"{form}_cuda_ms"] for form in FORMS}
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


if __name__ == "__main__":
    main()
