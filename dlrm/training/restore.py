"""Brings a run to where it begins: its own last checkpoint, another run's from which it branches off, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm.checkpoints.checkpoint import CheckpointStore, Restored
from dlrm.checkpoints.kept_checkpoints import say_what_remains
from dlrm.config import RunConfig, TrainingConfig
from dlrm.distributed.ranks import Ranks
from dlrm.training.run_config import CONFIG, check_same_path
from dlrm.training.run_log import METRICS
from dlrm.training.snapshot import Snapshot

CHECKPOINTS = "checkpoints"


def restore_run(
    checkpoints: CheckpointStore,
    snapshot: Snapshot,
    config: TrainingConfig,
    settings: Mapping[str, Any],
    output: Path,
) -> list[str]:
    """Set the live parts of a run to where it goes on, and say in lines where that is (a collective call).

    Args:
        checkpoints: the run's own.
        snapshot: its live parts.
        config: of the run.
        settings: as `describe_run` gives them.
        output: its folder.

    Raises:
        ValueError: the checkpoint is of other data or another model, or there is none to branch off from.
    """
    resized_tables = config.checkpoint.resized_tables
    restored = checkpoints.restore_latest()
    if restored is not None:
        resized = snapshot.load(restored.state, resized_tables=resized_tables)
        return [*restored.skipped, *resized, f"continuing after {restored.info.samples:,} samples"]
    if config.branch_from is None:
        return []
    restored = _find_branching_point(config.branch_from, config.branch_at, settings, checkpoints.ranks, type(config))
    resized = snapshot.load(restored.state, resized_tables=resized_tables)
    snapshot.course.forget_best()  # whose weights the branch does not have
    if checkpoints.ranks.is_first and (config.branch_from / METRICS).is_file():
        shutil.copyfile(config.branch_from / METRICS, output / METRICS)
    where = f"branching off from {config.branch_from} after {restored.info.samples:,} samples"
    return [*restored.skipped, *resized, where]


def _check_may_leave(run: Path, settings: Mapping[str, Any], kind: type[TrainingConfig]) -> None:
    if not (run / CONFIG).is_file():
        raise ValueError(f"--branch-from: expected the folder of a run, got {run}, which has no {CONFIG}")
    check_same_path(run, json.loads((run / CONFIG).read_text(encoding="utf-8")), settings, kind)


def _find_branching_point(
    run: Path, at: int | None, settings: Mapping[str, Any], ranks: Ranks, kind: type[TrainingConfig] = RunConfig
) -> Restored:
    """Read the newest checkpoint of a run after at most so many samples (a collective call)."""
    failure = None
    try:
        _check_may_leave(run, settings, kind)
    except ValueError as error:
        failure = error
    ranks.raise_any(failure)  # as one that does not see the folder would leave the others waiting for it
    folder = run / CHECKPOINTS
    restored = CheckpointStore(folder, ranks=ranks, read_only=True).restore_latest(at_most=at)
    if restored is None:
        flag = "--branch-from" if at is None else f"--branch-at {at}"
        raise ValueError(f"{flag}: expected a checkpoint of {run} up to there; {say_what_remains(folder)}")
    return restored
