"""Takes a run's time apart: how many seconds went into each stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Seconds by stage. Stages may nest: time spent in an inner one does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []  # the stages that one is in, outermost first; other threads may look
        self.entered = 0  # how many stages have been entered or left so far
        self._inner: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time within the block for `name`."""
        start = perf_counter()
        self._inner.append(0.0)
        self.open.append(name)
        self.entered += 1
        try:
            yield
        finally:
            spent = perf_counter() - start
            inner = self._inner.pop()
            self.open.pop()
            self.entered += 1
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner
            if self._inner:
                self._inner[-1] += spent
