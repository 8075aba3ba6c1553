"""Ctrl-C and SIGTERM ask a process to end in good order; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A terminal sends Ctrl-C to all processes, and a launcher may pass its own on: these are one request.
SECONDS_OF_ONE_REQUEST = 1.0
AT_ONCE_SECONDS = 2.0  # after which nothing is waited for
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BEFORE_READY = "before it was ready"
_INTERRUPTED = 130
_LOOK_SECONDS = 0.1


class StopSignal:
    """While open, signals set ``requested`` instead of ending the process.

    Args:
        at_once: They end it for now, with KeyboardInterrupt, as there is nothing yet to be ended in good order.
            Compilers may keep the interpreter from hearing of a signal for as long as they run, swallow the
            interrupt, or fail by it: so the process ends some seconds after the signal, and as an interrupted one,
            whatever it is at.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.requested = False
        self.at_once = at_once
        self._since = 0.0
        self._former: dict[int, Any] = {}
        self._former_fd = -1
        self._ends = threading.Event()
        self._told: socket.socket | None = None
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            if self.at_once:
                self._watch()
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._ends.set()
        if self._told is not None and self._watcher is not None:
            signal.set_wakeup_fd(self._former_fd)
            self._told.close()
            self._watcher.join()
        if self.at_once and self.requested and isinstance(error, Exception):
            raise KeyboardInterrupt(_BEFORE_READY) from error

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
            raise KeyboardInterrupt(_BEFORE_READY)
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Hears of signals when they come; ``_note`` is called only once the main thread is back in the interpreter."""
        heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._end_process, args=(heard,), name="signals", daemon=True)
        self._watcher.start()

    def _end_process(self, heard: socket.socket) -> None:
        with heard:
            while number := heard.recv(1):
                if number[0] in _SIGNALS and self.at_once and not self._ends.wait(AT_ONCE_SECONDS) and self.at_once:
                    print(f"recforge: error: interrupted {_BEFORE_READY}", file=sys.stderr, flush=True)
                    os._exit(_INTERRUPTED)
