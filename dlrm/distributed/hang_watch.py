"""Names the rank that hangs, and the stage it hangs in, where all the others can only wait for it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dlrm.distributed.one_voice import OneVoice, say_apart
from embeddings.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from dlrm.distributed.process_group import Group

FLAG = "--parallel.hang-timeout-seconds"
WATCHERS = 4  # ranks that look at all others; one is enough, unless it is the one that hangs
# In these a rank waits for others; whoever is in another one has something to do by itself.
WAITING = ("ids all-to-all", "rows all-to-all", "gradients all-to-all", "exposed all-reduce")
PREPARING, BUILDING, RESTORING, LAST_CHECKPOINT = (
    "preparing data",
    "building tables",
    "restoring a checkpoint",
    "waiting for the last checkpoint",
)
# Each comes once, and takes as long as the data or the tables are large, of one rank or of all.
UNTIMED = (PREPARING, BUILDING, RESTORING, LAST_CHECKPOINT)
HANGS = "hangs"
STATUS = 1  # an elastic launcher may start the ranks again


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What a rank publishes of itself.

    Attributes:
        beats: how often it has; a process that is stopped, or whose interpreter is stuck, no longer does.
        samples: trained so far.
        stages: entered or left so far.
        stage: the innermost one it is in.
        left: it has finished.
        process: its id.
        host: the machine's name; a process has its id there.
    """

    beats: int = 0
    samples: int = 0
    stages: int = 0
    stage: str = ""
    left: bool = False
    process: int = 0
    host: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        """What grows as long as the rank does not hang."""
        return self.samples, self.stages


class HangWatch:
    """While open, publishes how far this rank is, and ends the process when no rank has come further for too long.

    It works in a thread of its own, over a connection of its own, so also while the main thread is stuck inside a
    collective call.

    Args:
        group: of all ranks.
        voice: of all ranks; one of them tells.
        timeout_seconds: how long nothing may move.
        end: ends the process with a status; it does not come back.
    """

    def __init__(
        self, group: Group, voice: OneVoice, *, timeout_seconds: float, end: Callable[[int], None] = os._exit
    ) -> None:
        self.group, self.voice, self.end = group, voice, end
        self.timeout_seconds = timeout_seconds
        self.interval = min(1.0, timeout_seconds / 10)
        self._rank, self._count = group.ranks.rank, group.ranks.count
        self._keys = [f"pulse/{rank}" for rank in range(self._count)]
        self._followed: tuple[Stopwatch, Callable[[], int]] = (Stopwatch(), lambda: 0)
        self._beats, self._passed = 0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang watch", daemon=True)

    def follow(self, stopwatch: Stopwatch, samples: Callable[[], int]) -> None:
        """Take progress from these from now on."""
        self._passed += self._followed[0].entered + 1
        self._followed = (stopwatch, samples)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Be in a stage of that name until the block ends."""
        return self._followed[0].stage(name)

    def __enter__(self) -> HangWatch:
        if self._count > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        if self._count > 1:
            self._thread.join(self.interval + 1.0)

    def _run(self) -> None:
        seen: dict[int, _Seen] = {}
        try:
            store = self.group.open_store()
            while not self._closed.wait(self.interval):
                self._publish(store)
                if store.check([HANGS]):
                    return self._leave()
                if self._rank < WATCHERS and store.check(self._keys):
                    pulses = [read_pulse(value) for value in store.multi_get(self._keys)]
                    if (line := look(pulses, seen, time.monotonic(), self.timeout_seconds)) is not None:
                        self._tell(line, store)
                        self._kill_silent(pulses, seen)
                        return self._leave()
            self._publish(store, left=True)
        except RuntimeError:  # the store has gone, with the launcher or the rank that kept it; all end soon
            return

    def _publish(self, store: Store, *, left: bool = False) -> None:
        self._beats += 1
        stopwatch, samples = self._followed
        pulse = Pulse(
            beats=self._beats,
            samples=samples(),
            stages=self._passed + stopwatch.entered,
            stage=(stopwatch.open[-1:] or [""])[0],  # in one piece: the other thread may be leaving it
            left=left,
            process=os.getpid(),
            host=platform.node(),
        )
        store.set(self._keys[self._rank], json.dumps(asdict(pulse)))

    def _tell(self, line: str, store: Store) -> None:
        if self.voice.claim(STATUS, store) is None:
            say_apart(f"error: {line} ({FLAG} {self.timeout_seconds:g})")
        store.set(HANGS, line)

    def _kill_silent(self, pulses: Sequence[Pulse], seen: Mapping[int, _Seen]) -> None:
        """Kill siblings that no longer answer: a launcher would ask them to stop first, and wait for that in vain."""
        for rank in find_silent(pulses, seen, time.monotonic(), self.timeout_seconds):
            if rank != self._rank and is_sibling(pulses[rank]):
                with contextlib.suppress(OSError):
                    os.kill(pulses[rank].process, signal.SIGKILL)

    def _leave(self) -> None:
        if os.environ.get("RECFORGE_TRACEBACK") == "1":
            faulthandler.dump_traceback()
        self.end(STATUS)


@dataclass
class _Seen:
    """When a watcher last saw a rank come further, and when it last saw it answer."""

    progress: tuple[int, int]
    moved: float
    beats: int
    answered: float


def look(pulses: Sequence[Pulse], seen: dict[int, _Seen], now: float, timeout_seconds: float) -> str | None:
    """Note what has changed, and say who hangs once no rank has come further for so long.

    Args:
        pulses: by rank.
        seen: of the ranks, by earlier calls; is changed.
        now: seconds, of a clock that only goes forward.
        timeout_seconds: how long nothing may move.
    """
    for rank, pulse in enumerate(pulses):
        last = seen.setdefault(rank, _Seen(pulse.progress, now, pulse.beats, now))
        if pulse.beats != last.beats:
            last.beats, last.answered = pulse.beats, now
            if pulse.progress != last.progress or pulse.stage in UNTIMED:
                last.progress, last.moved = pulse.progress, now
    running = [rank for rank, pulse in enumerate(pulses) if not pulse.left]
    if not running or now - max(seen[rank].moved for rank in running) < timeout_seconds:
        return None
    silent = find_silent(pulses, seen, now, timeout_seconds)
    hung = silent or find_hung(pulses)
    still = now - max(seen[rank].moved for rank in hung)
    return _describe(pulses, hung, still, is_silent=bool(silent))


def find_silent(pulses: Sequence[Pulse], seen: Mapping[int, _Seen], now: float, timeout_seconds: float) -> list[int]:
    """Return the ranks that do not answer, while others do."""
    return [r for r, pulse in enumerate(pulses) if not pulse.left and now - seen[r].answered > timeout_seconds / 2]


def find_hung(pulses: Sequence[Pulse]) -> list[int]:
    """Return the ranks that the others wait for: of those with the fewest samples, one that has something to do."""
    running = [rank for rank, pulse in enumerate(pulses) if not pulse.left]
    fewest = min(pulses[rank].samples for rank in running)
    behind = [rank for rank in running if pulses[rank].samples == fewest]
    busy = [rank for rank in behind if pulses[rank].stage not in WAITING] or behind
    first = min(pulses[rank].stages for rank in busy)
    return [rank for rank in busy if pulses[rank].stages == first]


def read_pulse(value: bytes) -> Pulse:
    """Read what a rank has published."""
    return Pulse(**json.loads(value))


def _describe(pulses: Sequence[Pulse], hung: Sequence[int], still: float, *, is_silent: bool) -> str:
    pulse = pulses[hung[0]]
    where = f"in {pulse.stage!r}" if pulse.stage else "between two stages"
    if is_silent:
        did = f"no answer for {still:.0f} s (process {pulse.process}), last seen {where}"
    else:
        did = f"hangs {where} for {still:.0f} s" if len(hung) == 1 else f"hang {where} for {still:.0f} s"
    line = f"{_name(hung)}{':' * is_silent} {did}, after {pulse.samples:,} samples"
    stages: dict[str, list[int]] = {}
    for rank, other in enumerate(pulses):
        if rank not in hung:
            stage = "finished" if other.left else f"waiting in {other.stage!r}" if other.stage else "waiting"
            stages.setdefault(stage, []).append(rank)
    return "; ".join([line, *(f"{_name(ranks)} {stage}" for stage, ranks in stages.items())])


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def is_sibling(pulse: Pulse) -> bool:
    """Whether a rank is a process of this machine, with the same parent."""
    if pulse.host != platform.node():
        return False
    try:
        status = Path(f"/proc/{pulse.process}/stat").read_text()
    except OSError:
        return False
    return int(status.rpartition(")")[2].split()[1]) == os.getppid()
