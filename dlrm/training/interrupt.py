"""A run among other processes: it ends between two steps when it is asked to stop, and has its folder to itself."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from filelock import FileLock, Timeout

from dlrm.distributed.ranks import ALONE, Ranks

# A launcher of ranks passes on the Ctrl-C that the terminal has sent to every one of them already.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """While open, Ctrl-C and SIGTERM set `requested` instead of ending the process; a second one ends it."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt


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
