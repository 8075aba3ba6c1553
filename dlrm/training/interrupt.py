"""A run among other processes: it ends between two steps when it is asked to stop, and has its folder to itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dlrm.distributed.ranks import ALONE, Ranks
from parameter_server.processes.stop_signal import StopSignal


class StopRequest(StopSignal):
    """While open, Ctrl-C and SIGTERM set `requested` instead of ending the process; a second one ends it."""


@contextmanager
def only_run_in(folder: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Keep other runs out of `folder`; the lock is rank 0's and goes with its process, however that ends.

    Raises:
        ValueError: another process trains there; on every rank.
    """
    lock, error = FileLock(folder / ".lock", timeout=0), None
    if ranks.is_first:
        try:
            lock.acquire()
        except Timeout:
            error = ValueError(f"another process is training in {folder}; wait for it or choose another --output")
    ranks.raise_any(error)
    try:
        yield
    finally:
        lock.release()
