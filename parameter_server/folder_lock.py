"""A folder is one process's at a time: the lock that says so, and is let go of with the process that holds it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = "lock"


def lock_folder(folder: Path, *, flag: str = "", seconds: float = 0.0) -> FileLock:
    """Makes a folder, and keeps other processes out of it until the lock is released, or this process ends.

    Args:
        folder: Made if it is not there.
        flag: By which it was given, for the error.
        seconds: How long to wait for another to let go of it.

    Raises:
        ValueError: Another has it, this process included.
        OSError: It cannot be made.
    """
    place = f"{flag} {folder}".strip()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise OSError(f"{place}: expected a folder, or room to make one, got none: {why}") from error
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise ValueError(f"{place}: expected a folder of this process alone, got one that another uses") from None
    return lock
