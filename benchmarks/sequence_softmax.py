"""What does a softmax over a whole catalogue cost against sampled ones, in time, memory and quality?

Each arm is SASRec with the settings of the recipe `sasrec`, batch 256, on one thread: `full`, and softmaxes over items
that are drawn for each batch, all alike (`uniform_N`) or by popularity to the power of 0.75 (`popular_N`), beside the
batch's own targets or without them (`alone_N`), and over these by themselves (`in_batch`). Scores of drawn items are
corrected by log q.

Whole runs of `--epochs` come first, each a process of its own; 0 leaves them out. Of these are the peak of resident
memory, the processor seconds of all of the run with its rankings, and recall and NDCG of the test split, where all
items are ranked: `filtered` without those that the user has acted on. A run that was cut off goes on, and one in
`--folder` that has ended is read. `epoch_cpu_seconds` is measured afterwards in one process, where the arms take turns:
the median over `--turns` turns of `--batches` batches, reading included, times the batches of an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sequence_runs import remember_command

ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    **{f"uniform_{n}": ("--sequence.negatives", str(n)) for n in (1024, 4096)},
    **{f"popular_{n}": ("--sequence.negatives", str(n), "--sequence.negatives-power", "0.75") for n in (1024, 4096)},
    "alone_4096": ("--sequence.negatives", "4096", "--sequence.no-in-batch-negatives"),
    "in_batch": ("--sequence.negatives", "0"),
}
SHOWN = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
USAGE = "usage.json"


def main() -> None:
    """Train and measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sequences, as `recforge train` takes them")
    parser.add_argument("--folder", type=Path, default=Path("runs/sequence_softmax"), help="what was trained is kept")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--epochs", type=float, default=2.0, help="of the whole runs")
    parser.add_argument("--batches", type=int, default=15, help="of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of the whole runs")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    prepared, figures = _prepare(arguments.data, arguments.folder / "prepared")
    result: dict[str, Any] = {"epochs": arguments.epochs, **figures, "arms": {name: {} for name in arguments.arms}}
    if arguments.epochs:  # before torch is here: a process's peak of memory is no less than its parent's
        flags = ["--epochs", str(arguments.epochs), *arguments.flags]
        for name in arguments.arms:
            result["arms"][name] |= _train(arguments.folder / name, prepared, [*ARMS[name], *flags])
    if arguments.batches:
        seconds = _time(prepared, arguments.arms, arguments.batches, arguments.turns)
        for name, each in seconds.items():
            result["arms"][name] |= {"batch_ms": round(each * 1e3, 2), "epoch_cpu_seconds": each * figures["batches"]}
    print(json.dumps(result))


def _prepare(data: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """Return the folder of the prepared sequences, and how many there are."""
    from contrastive.data.prepare_sequences import prepare_sequences
    from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset
    from contrastive.recipes import RECIPES

    config = RECIPES["sasrec"].config
    is_prepared = (data / SEQUENCES).is_file()
    dataset = SequenceDataset(data) if is_prepared else prepare_sequences(config.schema, [data], folder)
    batches = -(-dataset.rows("train") // config.step.global_batch_size)
    return dataset.folder, {"items": dataset.num_items, "actions": dataset.info.num_actions, "batches": batches}


def _train(output: Path, data: Path, flags: list[str]) -> dict[str, float]:
    """Train an arm to its end, or read it; what its processes used is added up beside the run."""
    output.mkdir(parents=True, exist_ok=True)
    usage, summary = output / USAGE, output / "summary.json"
    used = json.loads(usage.read_text(encoding="utf-8")) if usage.is_file() else 0.0
    own = ["--data", str(data), "--output", str(output), "--step.threads", "1"]
    command = ["train", "sasrec", *own, *flags]
    remember_command(output.with_suffix(".command"), command)
    if not summary.is_file():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        program = [sys.executable, "-m", "deploy.cli", *command]
        code = subprocess.run(program, stdout=sys.stderr, check=False).returncode
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        usage.write_text(json.dumps(used), encoding="utf-8")
        if code:
            sys.exit(f"{output.name}: expected the run to end, got status {code}; the same command continues it")
    found = json.loads(summary.read_text(encoding="utf-8"))
    ranked = {
        f"{kind}/{name}": found["ranked"][f"{kind}/{name}"] for kind in ("unfiltered", "filtered") for name in SHOWN
    }
    return {"run_cpu_seconds": used, "peak_resident_gib": found["peak_rss_bytes"] / 2**30, **ranked}


def _time(data: Path, arms: list[str], batches: int, turns: int) -> dict[str, float]:
    """Return the processor seconds of a batch of each arm."""
    import torch

    from benchmarks.mclrec import step_of, take_turns
    from contrastive.build import build_model
    from contrastive.command import SEQUENCES_RUNS
    from contrastive.data.sequence_dataset import SequenceDataset
    from contrastive.next_item import NextItem
    from contrastive.recipes import RECIPES
    from dlrm.cli import parse
    from dlrm.training.trainer import Trainer
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = SequenceDataset(data)
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name in arms:
            config = parse(SEQUENCES_RUNS.config, ARMS[name], program="recforge", default=RECIPES["sasrec"].config)
            trainer = Trainer(build_model(config, dataset), NextItem(dataset, config), config, Path(folder) / name)
            steps[name] = step_of(trainer)
        return take_turns(steps, batches, turns)


if __name__ == "__main__":
    main()
