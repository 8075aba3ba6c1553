"""Ctrl-C and SIGTERM ask a process to end in good order; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A terminal sends Ctrl-C to all processes, and a launcher may pass its own on: these are one request.
SECONDS_OF_ONE_REQUEST = 1.0
AT_ONCE_SECONDS = 5.0  # compilers keep the interpreter from interrupting what runs, or swallow that
_INTERRUPTED = 130
_LOOK_SECONDS = 0.1


class StopSignal:
    """While open, signals set ``requested`` instead of ending the process.

    Args:
        at_once: They end it for now, with KeyboardInterrupt, as there is nothing yet to be ended in good order.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self.at_once = at_once
        self._since = 0.0
        self._former: dict[int, Any] = {}
        self._end: threading.Timer | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._end is not None:
            self._end.cancel()
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def wait(self, seconds: float = _LOOK_SECONDS) -> bool:
        """Waits for a signal; says whether there was one."""
        end = time.monotonic() + seconds
        # No lock is waited for: its holder may be whom the signal interrupts.
        while not self.requested and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))
        return self.requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            self.requested = True
            if self._end is None:
                self._end = threading.Timer(AT_ONCE_SECONDS, self._end_process)
                self._end.daemon = True
                self._end.start()
            raise KeyboardInterrupt("before it was ready")
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

    def _end_process(self) -> None:
        if self.at_once:
            print("recforge: error: interrupted before it was ready", file=sys.stderr, flush=True)
            os._exit(_INTERRUPTED)
