"""Trains recommenders of sequences by the command line; what was trained is read, and not trained again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sequence_methods import Flags


@dataclass(frozen=True)
class Run:
    """One run of the command line.

    Attributes:
        name: of its folder.
        recipe: of `recforge train`.
        flags: all others but the epochs.
        epochs: to train; where fewer have been trained, the run goes on.
    """

    name: str
    recipe: str
    flags: Flags
    epochs: int


@dataclass(frozen=True)
class Found:
    """What is kept of a run.

    Attributes:
        valid: the best validation MRR@10, by which checkpoint and settings are chosen.
        best_at: after how many samples it was reached.
        ranked: values of the test split, as "filtered/recall@10".
        seconds: of training.
    """

    valid: float
    best_at: int
    ranked: dict[str, float]
    seconds: float


class SequenceRuns:
    """Runs on one file of sequences, each in a folder of its own and on one thread.

    Args:
        folder: of all runs.
        data: what `recforge train --data` takes.
        workers: runs at a time.
    """

    def __init__(self, folder: Path, data: Path, workers: int = 1) -> None:
        self._folder, self._data, self._workers = folder, data, workers
        folder.mkdir(parents=True, exist_ok=True)

    def all(self, runs: list[Run]) -> list[Found]:
        """Train what is not trained yet, some at a time; a run that was interrupted goes on."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._run, runs))

    def _run(self, run: Run) -> Found:
        output = self._folder / run.name
        own = ["--data", str(self._data), "--output", str(output), "--step.threads", "1", *run.flags]
        command = ["train", run.recipe, *own]
        remember_command(self._folder / f"{run.name}.command", command)
        if not _has_ended(output, run.epochs):
            (output / "summary.json").unlink(missing_ok=True)  # of fewer epochs
            with (self._folder / f"{run.name}.log").open("ab") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                program = [sys.executable, "-m", "deploy.cli", *command, "--epochs", str(run.epochs)]
                subprocess.run(program, check=True, stdout=log, stderr=log, env=environment)
        return read(output, run.epochs)


def _has_ended(output: Path, epochs: int) -> bool:
    """Say whether a run was measured after so many epochs, or after more."""
    measured, told = output / "summary.json", output / "config.json"
    return measured.is_file() and json.loads(told.read_text(encoding="utf-8"))["epochs"] >= epochs


def remember_command(file: Path, command: list[str]) -> None:
    """Write down how a run is started, so that what another command has trained is not taken for its result.

    Raises:
        ValueError: the file holds another command.
    """
    asked = shlex.join(command)
    if file.is_file() and (before := file.read_text(encoding="utf-8")) != asked:
        raise ValueError(f"{file}: expected `{asked}`, got `{before}`, which was trained; choose another --folder")
    file.write_text(asked, encoding="utf-8")


def read(output: Path, epochs: int) -> Found:
    """Read what is kept of the run of a folder, of validation what was known after so many epochs."""
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    lines = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    trained = json.loads((output / "config.json").read_text(encoding="utf-8"))["epochs"]
    end = summary["samples"] * epochs / trained
    evaluations = [line for line in lines if line["kind"] == "valid" and line["samples"] <= end]
    best = max(evaluations, key=lambda line: line["mrr_10"])
    return Found(best["mrr_10"], best["samples"], summary["ranked"], summary["seconds"])
