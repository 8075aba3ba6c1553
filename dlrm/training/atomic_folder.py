"""Folders that are there whole or not at all, whenever the process that makes or removes them is killed."""

from __future__ import annotations

import fcntl
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

    Files written in the block must be synced there. A lock that dies with the process says that the folder is in use.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f"{WRITING}{uuid4().hex}"
    scratch.mkdir()
    descriptor = os.open(scratch, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield scratch
        scratch.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no half of it is ever seen under its name."""
    doomed = folder.with_name(f"{REMOVING}{uuid4().hex}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left in `parent`, but not what a living one is writing."""
    for leftover in (*parent.glob(f"{WRITING}*"), *parent.glob(f"{REMOVING}*")):
        if not _is_in_use(leftover):
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
