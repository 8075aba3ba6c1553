"""Opens what a user names to read weights from: a run's folder, or one checkpoint in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dlrm.checkpoints.checkpoint import CheckpointStore, Restored
from dlrm.checkpoints.manifest import MANIFEST
from dlrm.training.run_config import CONFIG


def open_run(source: Path, *, best: bool | None = False) -> tuple[Restored, dict[str, Any]]:
    """Read a checkpoint, whose tables stay on the disk, and the run's configuration.

    Args:
        source: a run's folder, or one of its checkpoints.
        best: of a run, take the best checkpoint instead of the last; None takes the last where none was the best.

    Raises:
        ValueError: it is neither, holds no such checkpoint, or is damaged.
    """
    is_checkpoint = (source / MANIFEST).is_file()
    run = source.resolve().parent.parent if is_checkpoint else source
    if not is_checkpoint and not (run / "checkpoints").is_dir():
        raise ValueError(f"expected the folder of a run or a checkpoint, got {source}")
    if not (run / CONFIG).is_file():
        raise ValueError(f"expected {run / CONFIG}, which says what the tables of {source} are for, got no such file")
    store = CheckpointStore(run / "checkpoints", read_only=True)
    if is_checkpoint:
        if best:
            raise ValueError(f"--best: expected the folder of a run to choose from, got the checkpoint {source}")
        restored: Restored | None = store.restore(source)
    else:
        restored = None if best is False else store.restore_best()
        if not best and restored is None:
            restored = store.restore_latest()
    if restored is None:
        kind = "a checkpoint that was the best" if best else "a checkpoint"
        raise ValueError(f"expected {kind} in {run / 'checkpoints'}, got none")
    return restored, json.loads((run / CONFIG).read_text(encoding="utf-8"))
