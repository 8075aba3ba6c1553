"""How much faster is a prepared dataset read than the training step consumes it?

The shapes are those of `train_step` (batch 4,096; 13 numbers; 26 features, one-hot: one id each, multi-hot: 1 to 32,
8 on average). Reading is what training does: shuffled, ahead in a thread, up to the batch with its `KeyedJaggedTensor`.
Reader and step take turns in one process; each figure is the median of its turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dlrm.data.dataset import Bags, Dataset, IntArray

PARTS, ROWS_PER_PART = 6, 1 << 16
BATCHES_PER_TURN = 8


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each that are measured")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    # One busy neighbour makes spinning threads several times slower; torch reads this when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result: dict[str, float] = {"threads": arguments.threads}
    for kind in ("one_hot", "multi_hot"):
        with tempfile.TemporaryDirectory() as folder:
            read_ms, step_ms = _compare(Path(folder), kind == "multi_hot", arguments.threads, arguments.rounds)
        suffix = "" if kind == "one_hot" else f"_{kind}"
        result |= {f"reader_vs_step{suffix}": round(step_ms / read_ms, 2), f"step_ms{suffix}": round(step_ms, 2)}
        result |= {f"reader_ms{suffix}": round(read_ms, 3)}
        print(f"{kind}: a batch is read in {read_ms:.2f} ms and trained in {step_ms:.1f} ms", file=sys.stderr)
    print(json.dumps(result))


def _compare(folder: Path, multi_hot: bool, threads: int, rounds: int) -> tuple[float, float]:
    import torch

    from benchmarks.click_networks import BATCH_SIZE, build_steps, draw_batches
    from dlrm.data.reader import Reader

    torch.set_num_threads(threads)
    reader = Reader(_write_dataset(folder, multi_hot), "train", shuffle=True)
    batches = reader.batches(BATCH_SIZE)
    step = next(step for name, step in build_steps(draw_batches(2, multi_hot=multi_hot)) if name == "ours")
    numbers = count()
    turns: dict[str, Callable[[], object]] = {
        "read": lambda: [len(next(batches)) for _ in range(BATCHES_PER_TURN)],
        "step": lambda: step(next(numbers)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 2):
        for name, work in turns.items():
            start = time.perf_counter()
            work()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    # two batches of a turn were read while the step before it ran
    read = statistics.median(seconds["read"]) / (BATCHES_PER_TURN - 2)
    return read * 1e3, statistics.median(seconds["step"]) * 1e3


def _write_dataset(folder: Path, multi_hot: bool) -> Dataset:
    from benchmarks.click_networks import BAG_END_PROBABILITY, LONGEST_BAG, NAMES, NUM_NUMERIC, NUM_ROWS
    from dlrm.data.dataset import Bags, Dataset, DatasetInfo, FeatureInfo, Part, write_part

    rng = np.random.default_rng(0)
    parts = []
    for index in range(PARTS):
        features: dict[str, IntArray | Bags] = {}
        for name in NAMES:
            lengths = np.minimum(rng.geometric(BAG_END_PROBABILITY, ROWS_PER_PART), LONGEST_BAG)
            ids = rng.integers(0, NUM_ROWS, lengths.sum() if multi_hot else ROWS_PER_PART, dtype=np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            features[name] = Bags(offsets=offsets, values=ids) if multi_hot else ids
        part = Part(
            label=rng.integers(0, 2, ROWS_PER_PART, dtype=np.uint8),
            numeric=rng.standard_normal((ROWS_PER_PART, NUM_NUMERIC), dtype=np.float32),
            features=features,
            extra={},
        )
        parts.append(write_part(folder, "train", index, part))
    infos = tuple(FeatureInfo(name=name, num_rows=NUM_ROWS, is_list=multi_hot) for name in NAMES)
    numeric = tuple(f"I{number}" for number in range(1, NUM_NUMERIC + 1))
    DatasetInfo(numeric=numeric, features=infos, splits={"train": tuple(parts)}).write(folder)
    return Dataset(folder)


if __name__ == "__main__":
    main()
