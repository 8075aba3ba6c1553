"""Folders that are there whole or not at all, whenever the process that makes or removes them is killed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

WRITING, REMOVING = ".writing-", ".removing-"


@contextmanager
def make_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`, which becomes `target` when the block ends without an error.

    Files written in the block must be synced there. What killed processes left of the same target is removed.
    """
    remove_leftovers(target.parent, f"{target.name}.")
    with share_folder(target.parent / f"{WRITING}{target.name}.{uuid4().hex}") as scratch:
        try:
            yield scratch
            publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def share_folder(scratch: Path) -> Iterator[Path]:
    """Make a folder, or join others who write into it; a lock that dies with the process says that it is in use."""
    scratch.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield scratch
    finally:
        os.close(descriptor)


def publish(scratch: Path, target: Path) -> None:
    """Give a folder whose files are on the disk its name, beside it."""
    scratch.rename(target)
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    doomed = folder.with_name(f"{REMOVING}{uuid4().hex}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what killed processes left in `parent`, of names that begin so; but not what a living one is writing."""
    begins = glob.escape(name)
    for leftover in (*parent.glob(f"{WRITING}{begins}*"), *parent.glob(f"{REMOVING}{begins}*")):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
        elif not _is_in_use(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_in_use(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
