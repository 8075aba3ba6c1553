"""How many processor seconds does an epoch of MCLRec, of its two-step form and of SASRec take, and a full ranking?

One thread, batch 256, the settings of the recipe `mclrec-beauty`, on the sequences of `--data`. Whole steps of the loop
are measured, reading and augmenting included: the median over `--turns` turns of `--batches` batches that the forms
take alternately after a warm-up, times the batches of an epoch. `_per_thousand` is for 1,000 training samples.
`floor_share` is what the matrix products of a three-step batch alone would take, at the rate of the encoder's widest
product, over what the batch takes. Products inside the kernels of attention are not counted: on Amazon Beauty they are
another 2 % of the others. `full_ranking_cpu_seconds` ranks all items for all users of the test split, with
what is reported of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contrastive.config import SequenceRunConfig
    from contrastive.data.sequence_dataset import SequenceDataset
    from dlrm.training.trainer import Trainer

FORMS = ("three_step", "two_step", "sasrec")


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="sequences, as `recforge train` takes them; none are generated ones")
    parser.add_argument("--batches", type=int, default=20, help="of a turn")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    import torch

    from contrastive.data.provide_sequences import provide_sequences
    from contrastive.recipes import RECIPES
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    config = RECIPES["mclrec-beauty"].config
    dataset = provide_sequences(config.schema, arguments.data, is_synthetic=True)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: build(name, config, dataset, Path(folder) / name) for name in FORMS}
        steps = {name: step_of(trainer) for name, trainer in trainers.items()}
        seconds = take_turns(steps, arguments.batches, arguments.turns)
        figures = _describe(seconds, dataset.rows("train"), config.step.global_batch_size)
        figures["floor_share"] = _floor(steps["three_step"]) / seconds["three_step"]
        figures["full_ranking_cpu_seconds"] = _rank(trainers["sasrec"])
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def build(name: str, config: SequenceRunConfig, dataset: SequenceDataset, folder: Path, device: str = "cpu") -> Trainer:
    """Return the trainer of one of `FORMS`, of which nothing is trained yet."""
    from contrastive.build import build_model
    from contrastive.next_item import NextItem
    from dlrm.training.trainer import Trainer

    form: dict[str, Any] = {"contrast": "none"} if name == "sasrec" else {"form": name}
    config = replace(config, mclrec=replace(config.mclrec, **form))
    model = build_model(config, dataset, device=device)
    return Trainer(model, NextItem(dataset, config), config, folder, recipe=name)


def step_of(trainer: Trainer) -> Callable[[], None]:
    """Return what trains on the next batch."""
    batches = trainer.reader.batches(trainer.config.step.global_batch_size)
    trainer.model.train()
    samples = 0

    def step() -> None:
        nonlocal samples
        batch = next(batches)
        samples += len(batch)
        trainer.step(batch, samples)

    return step


def take_turns(
    steps: dict[str, Callable[[], None]], batches: int, turns: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Return the seconds of a batch by a clock; those of the processor have the reader's thread in them."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            begun = clock()
            for _ in range(batches):
                step()
            if turn:  # the first one compiles
                found[name].append((clock() - begun) / batches)
    return {name: statistics.median(each) for name, each in found.items()}


def _describe(seconds: dict[str, float], samples: int, batch_size: int) -> dict[str, float]:
    batches = -(-samples // batch_size)
    figures = {f"{name}_epoch_cpu_seconds": each * batches for name, each in seconds.items()}
    return figures | {f"{name}_per_thousand": each * 1000 / batch_size for name, each in seconds.items()}


def _floor(step: Callable[[], None], repeats: int = 40) -> float:
    """Return the processor seconds that the matrix products of one batch would take by themselves."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    tokens, weight = torch.randn(4096, 64), torch.randn(64, 256)
    out = torch.empty(4096, 256)
    spent = []
    for _ in range(repeats):
        begun = time.process_time()
        torch.mm(tokens, weight, out=out)
        spent.append(time.process_time() - begun)
    rate = 2 * tokens.numel() * 256 / statistics.median(spent)
    return float(counter.get_total_flops() / rate)


def _rank(trainer: Trainer) -> float:
    reader = trainer.problem.reader("test", trainer.config)
    begun = time.process_time()
    trainer.problem.measure(trainer.model, reader, trainer.config, trainer.place)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
