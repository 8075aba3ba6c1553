"""Begins a run of parameter servers with the weights of another run: one trainer brings them, the others wait."""

from __future__ import annotations

import time
from pathlib import Path

from dlrm.asynchronous.membership import Membership
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.training.restore import CHECKPOINTS
from dlrm.training.run_config import CONFIG

LOOK_SECONDS = 0.5
TRAINERS = "trainers"  # of a run's folder, where each trainer has one of its own


def check_output(output: Path) -> None:
    """Check that a folder holds no run without servers, which would be taken for this one when both have ended.

    Raises:
        ValueError: it does.
    """
    if (output / CONFIG).is_file() and not (output / TRAINERS).is_dir():
        raise ValueError(
            f"--output {output}: expected a new folder, or that of a run of parameter servers, got one that `recforge "
            f"train` has made; begin with its weights in another folder with --branch-from {output}"
        )


def find_first_sample(run: Path | None, at: int | None) -> int:
    """Say after how many samples the checkpoint was taken with which a run begins; 0 without one.

    Args:
        run: another run's folder.
        at: samples after which it was taken at the latest; None: the newest one.

    Raises:
        ValueError: there is none.
    """
    if run is None:
        return 0
    taken = [info.samples for info in CheckpointStore(run / CHECKPOINTS, read_only=True).list()]
    early = [samples for samples in taken if at is None or samples <= at]
    if not early:
        raise ValueError(f"--branch-from: expected a checkpoint in {run / CHECKPOINTS} up to there, got none")
    return max(early)


def brings_weights(membership: Membership) -> bool:
    """Say whether this trainer is the one that loads the checkpoint, or else wait until another one has.

    The oldest one that lives does, so that another takes over where it dies, and loads it all again. It has, once data
    are given out: from then on a second load would take away pushes that no trainer brings again.

    Args:
        membership: of this trainer.
    """
    while True:
        if membership.client.status().has_begun:
            return False
        if membership.is_oldest():
            return True
        membership.check()
        time.sleep(LOOK_SECONDS)
