"""Processes that are started, watched, started again and stopped together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dlrm.cli import ERROR, INTERRUPTED
from dlrm.distributed.place import LAUNCHER

FINAL = (ERROR, INTERRUPTED)  # statuses that another start would not change
TAIL_BYTES = 8192
STOP_SECONDS = 120.0  # for a last save, when asked to end
FAILED_STOP_SECONDS = 15.0  # the same beside one that cannot go on, for which others may wait in vain
TELL_SECONDS = 3.0  # of a stop, before people are told who is waited for
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a process is there for.

    Attributes:
        name: of the process, and of its log.
        program: arguments of the interpreter.
        order: in which processes stop; those of the lowest first.
        ends_by_itself: the crew's work is done when all such processes have ended with status 0.
        environment: beside this process's.
    """

    name: str
    program: Sequence[str]
    order: int
    ends_by_itself: bool = False
    environment: Mapping[str, str] | None = None


class Member:
    """A process of a crew, which ends when this one does, however that happens.

    Args:
        role: of it.
        folder: where `<name>.log` takes what it prints.
    """

    def __init__(self, role: Role, folder: Path) -> None:
        self.role = role
        self.log = folder / f"{role.name}.log"
        self.restarts = 0
        self.has_ended = False  # as it should
        self.is_asked = False  # to end
        self._from = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process in a session of its own, so that a terminal's Ctrl-C reaches the crew alone."""
        environment = {**os.environ, **(self.role.environment or {}), LAUNCHER: str(os.getpid())}
        with self.log.open("ab") as log:
            self._from = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, *self.role.program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Its number while it runs, or None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def status(self) -> int | None:
        """Return its exit status, below 0 that of a signal; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def send(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.pid is not None and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def reap(self) -> None:
        """Wait for it."""
        if self._process is not None:
            self._process.wait()

    def last_words(self) -> str:
        """Return the last line that it has printed since it was started, without what all such lines begin with."""
        with self.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._from, end - TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").replace("\r", "\n").splitlines()]
        said = [line for line in lines if line]
        errors = [line for line in said if line.startswith("recforge: error: ")]
        return (errors or said or [""])[-1].removeprefix("recforge: error: ")


class Crew:
    """All processes of a job; none of them outlives the block.

    Args:
        roles: of all of them, in the order in which they start.
        folder: of their logs.
        max_restarts: of each, after the first start.
        say: tells people in one line what has happened.
    """

    def __init__(self, roles: Sequence[Role], folder: Path, *, max_restarts: int, say: Callable[[str], None]) -> None:
        self.members = [Member(role, folder) for role in roles]
        self._max_restarts = max_restarts
        self._say = say
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Crew:
        try:
            for member in self.members:
                member.start()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if isinstance(error, Exception):  # others may still save what they hold; who presses Ctrl-C twice has seen
                self.stop(FAILED_STOP_SECONDS)
        finally:
            self._kill()

    def look(self) -> bool:
        """See after all processes, and start again those that were lost; return whether the work is done.

        Raises:
            ValueError: one cannot go on, and why.
        """
        for member in self.members:
            status = member.status()
            if status is None or member.has_ended:
                continue
            if status == 0:
                member.has_ended = True
            else:
                self._start_again(member, status)
        working = [member for member in self.members if member.role.ends_by_itself]
        return all(member.has_ended for member in working)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask all processes to end, those whom others need last, and end those that do not.

        Raises:
            KeyboardInterrupt: somebody would not wait.
        """
        for order in sorted({member.role.order for member in self.members}):
            asked = [member for member in self.members if member.role.order == order]
            for member in asked:
                member.is_asked = True
                member.send(signal.SIGTERM)
            self._await(asked, seconds)
            for member in asked:
                if member.pid:
                    self._say(f"{member.role.name} has not ended within {seconds:g} s of being asked, and is killed")
                    member.send(signal.SIGKILL)
                member.reap()

    def failures(self) -> Iterator[str]:
        """Yield a line for each process that has not ended well, once all have ended."""
        for member in self.members:
            # A signal ends at once whom it reaches before it is up, and who holds nothing then.
            ends = {0, INTERRUPTED, -signal.SIGTERM} if member.is_asked else {0, INTERRUPTED}
            if (status := member.status()) is not None and status not in ends:
                yield f"{member.role.name} {describe_end(status)}{_because(member)}"

    def _await(self, asked: Sequence[Member], seconds: float) -> None:
        now = time.monotonic()
        end, told = now + seconds, now + TELL_SECONDS
        while (left := [member.role.name for member in asked if member.pid]) and (now := time.monotonic()) < end:
            if now >= told:
                self._say(f"waiting for {', '.join(left)} to end, {end - now:.0f} s more at most")
                told = end if len(left) == 1 else now + 5 * TELL_SECONDS
            time.sleep(_LOOK_SECONDS)

    def _start_again(self, member: Member, status: int) -> None:
        what = f"{member.role.name} {describe_end(status)}{_because(member)}"
        if status in FINAL:
            raise ValueError(what)
        if member.restarts >= self._max_restarts:
            raise ValueError(f"{what}; no restart is left (--max-restarts {self._max_restarts})")
        member.restarts += 1
        self._say(f"{what}; it is started again (restart {member.restarts} of {self._max_restarts})")
        member.start()

    def _kill(self) -> None:
        for member in self.members:
            member.send(signal.SIGKILL)
        for member in self.members:
            member.reap()


def describe_end(status: int) -> str:
    """Say in words how a process has ended."""
    if status >= 0:
        return f"has ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _because(member: Member) -> str:
    words = member.last_words()
    return f": {words}" if words else ""
