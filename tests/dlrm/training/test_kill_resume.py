"""The proof of checkpoints: a run killed with SIGKILL again and again ends, bit for bit, as one that was left alone.

It holds of both kinds of models that the loop trains: of clicks, and of sequences in three passes over each batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from contrastive.data.sequence_dataset import SequenceDataset
from contrastive.data.synthetic_sequences import SyntheticSequencesConfig, generate_sequences
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.pieces import PartedTensor
from dlrm.data.dataset import Dataset
from dlrm.training.run_log import read_records

IMPORTED = ("dlrm.training.command", "dlrm.training.trainer", "dlrm.data.provide", "torch.utils.tensorboard")
SETTINGS = {
    "epochs": 3,
    "seed": 5,
    "step.global-batch-size": 384,
    "log-every-samples": 1,
    "model.bottom": 96,
    "model.top": 96,
    "model.dropout": 0.3,
    "dense.name": "lamb",
    "dense.learning-rate": 0.01,
    "dense-schedule.warmup-samples": 9000,
    "dense-schedule.hold-samples": 6000,
    "dense-schedule.decay-samples": 30_000,
    "tables-schedule.warmup-samples": 3000,
    "tables-schedule.decay-samples": 40_000,
    "evaluation.every-samples": 7000,
    "checkpoint.every-samples": 1500,
    "guards.chance-evaluations": 0,
}
SEQUENCES = {
    "epochs": 3,
    "seed": 5,
    "dim": 16,
    "encoder.inner": 32,
    "encoder.dropout": 0.3,
    "encoder.attention-dropout": 0.3,
    "mclrec.views-weight": 0.1,
    "step.global-batch-size": 48,
    "log-every-samples": 1,
    "dense.name": "lamb",
    "dense.learning-rate": 0.01,
    "dense-schedule.warmup-samples": 900,
    "dense-schedule.decay-samples": 3000,
    "evaluation.every-samples": 900,
    "checkpoint.every-samples": 190,
    "guards.chance-evaluations": 0,
}
RECIPES = {"clicks": ("synthetic", SETTINGS), "sequences": ("mclrec-synthetic", SEQUENCES)}


class Run:
    """A training command that can be started again and again in one folder, and killed."""

    def __init__(self, kind: str, folder: Path, data: Path, threads: int, commands: Any) -> None:
        self.folder, self.commands = folder, commands
        self.errors = folder.with_suffix(".err")
        recipe, settings = RECIPES[kind]
        settings = settings | {"data": data, "output": folder, "step.threads": threads}
        self.argv = ["train", recipe, *(word for name in settings for word in (f"--{name}", str(settings[name])))]

    def start(self) -> int:
        return int(self.commands.start(self.argv, self.errors))

    def finish(self) -> int:
        self.start()
        return int(self.commands.wait())

    def kill_when(self, ready: Callable[[], bool]) -> bool:
        """Start, kill as soon as `ready`, and say whether the run was still alive then."""
        process = self.start()
        deadline = time.monotonic() + 60
        while not ready() and not (self.folder / "summary.json").exists():
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.004)
        os.kill(process, signal.SIGKILL)
        return bool(self.commands.wait() == -signal.SIGKILL)

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in read_records(self.folder) if record["kind"] == "train"]

    def is_writing(self) -> bool:
        with contextlib.suppress(FileNotFoundError):  # renamed while it was looked through
            return any(self.folder.glob("checkpoints/.writing-*/*"))
        return False

    def saved_samples(self) -> list[int]:
        return [info.samples for info in CheckpointStore(self.folder / "checkpoints").list()]


def without_times(value: Any) -> Any:
    """Leave out times, memory and place; tensors become their bytes."""
    if isinstance(value, PartedTensor):
        value = value.read()
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        other = {"seconds", "samples_per_second", "stage_seconds", "stages", "peak_rss_bytes", "folder"}
        return {key: without_times(item) for key, item in value.items() if key not in other}
    if isinstance(value, list | tuple):
        return [without_times(item) for item in value]
    return value


def assert_same(killed: Run, whole: Run) -> None:
    ours, theirs = (without_times(list(read_records(run.folder))) for run in (killed, whole))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other
    left, right = (CheckpointStore(run.folder / "checkpoints") for run in (killed, whole))
    for restore in (CheckpointStore.restore_latest, CheckpointStore.restore_best):
        mine_at, other_at = restore(left), restore(right)
        assert mine_at is not None
        assert other_at is not None
        assert mine_at.info.samples == other_at.info.samples
        mine_state, other_state = without_times(mine_at.state), without_times(other_at.state)
        assert list(mine_state) == list(other_state)
        for part in mine_state:
            assert mine_state[part] == other_state[part], part
    summaries = [without_times(json.loads((run.folder / "summary.json").read_text())) for run in (killed, whole)]
    assert summaries[0] == summaries[1]


def flip_a_byte(checkpoints: Path, dice: random.Random) -> str:
    newest = CheckpointStore(checkpoints).list()[0].folder
    path = dice.choice(sorted(newest.glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1
    path.write_bytes(content)
    return newest.name


@pytest.fixture
def samples(kind: str, click_log: Dataset, tmp_path: Path) -> Dataset | SequenceDataset:
    if kind == "clicks":
        return click_log
    few = SyntheticSequencesConfig(num_users=300, num_items=60, num_tastes=4, mean_actions=8.0, most_actions=20)
    return generate_sequences(few, tmp_path / "sequences")


@pytest.mark.parametrize(
    ("kind", "threads"),
    [
        ("clicks", 1),
        pytest.param("clicks", 2, marks=pytest.mark.long),
        pytest.param("sequences", 1, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_left_alone(
    kind: str, threads: int, tmp_path: Path, samples: Dataset | SequenceDataset, commands: Any
) -> None:
    dice, epoch = random.Random(threads), samples.rows("train")
    whole = Run(kind, tmp_path / "whole", samples.folder, threads, commands)
    assert whole.finish() == 0, whole.errors.read_text()
    size = RECIPES[kind][1]["step.global-batch-size"]
    assert epoch % size, "the last batch of an epoch is cut"
    steps = 3 * math.ceil(epoch / size)
    assert len(whole.steps()) == steps

    run = Run(kind, tmp_path / "killed", samples.folder, threads, commands)
    kills = kills_inside_a_write = 0
    resumed_at = set()
    damaged = ""
    for number, step in enumerate(sorted(dice.sample(range(1, steps - 6), 7))):

        def is_far_enough(step: int = step, inside_a_write: bool = number % 2 == 1) -> bool:
            return len(run.steps()) >= step and (run.is_writing() or not inside_a_write)

        kills += run.kill_when(is_far_enough)
        kills_inside_a_write += run.is_writing()
        resumed_at |= set(run.saved_samples()[:1])
        if not damaged and len(run.saved_samples()) > 1 and number > 2:
            damaged = flip_a_byte(run.folder / "checkpoints", dice)
    assert run.finish() == 0, run.errors.read_text()
    assert kills >= 4
    assert kills_inside_a_write >= 1, "no kill fell into the write of a checkpoint"
    assert len({at // epoch for at in resumed_at}) >= 2, f"resumed in too few epochs: {resumed_at}"
    said = run.errors.read_text()
    assert damaged in next(line for line in said.splitlines() if "is damaged (checksum)" in line)
    assert "Traceback" not in said
    assert_same(run, whole)
