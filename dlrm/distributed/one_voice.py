"""An error of a run of many ranks is one line from one rank: the first that failed, not those it took along."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from dlrm.cli import LOST, status_of
from dlrm.distributed.place import Place

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

SAID = "said"
WAIT_SECONDS = 5.0  # for another rank's word, by a rank that has only lost a connection


class OneVoice:
    """Around what a rank does: the first rank with an error lets it pass, and the others end as quietly as they can.

    RECFORGE_TRACEBACK=1 lets all errors pass.

    Args:
        place: of this process.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.store: Store | None = None  # once the ranks have met; before that, ranks of one machine share a folder

    def __enter__(self) -> OneVoice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> Literal[False]:
        alone = self.place.count == 1 or os.environ.get("RECFORGE_TRACEBACK") == "1"
        if error is None or alone or isinstance(error, SystemExit):
            return False
        status = status_of(error)
        # A lost connection is an OSError of which another start may be free.
        is_clear = isinstance(error, KeyboardInterrupt | ValueError | OSError) and status != LOST
        is_lost = not is_clear and _is_lost_connection(error)
        if is_lost:
            self._wait_for_others()
        said = self.claim(status)
        if said is not None:
            raise SystemExit(said) from None
        if self.place.rank != 0:
            print(_new_line(), end="", file=sys.stderr, flush=True)
        if isinstance(error, KeyboardInterrupt):
            return False
        message = str(error)
        if is_clear:
            raise ValueError(
                message if message.startswith("rank ") else f"rank {self.place.rank}: {message}"
            ) from error
        if is_lost:
            raise ConnectionError(
                f"rank {self.place.rank} lost its connection to another rank, which has ended or cannot be reached: "
                f"{(message.splitlines() or [type(error).__name__])[0]}"
            ) from error
        raise RuntimeError(f"rank {self.place.rank}: {type(error).__name__}: {message}") from error

    def share(self, store: Store) -> None:
        """Settle who speaks through a store that all ranks see, from now on."""
        self.store = store

    def claim(self, status: int, store: Store | None = None) -> int | None:
        """Ask to speak for all ranks, which end with `status`; return another's status if it has spoken already.

        Args:
            status: of this rank.
            store: another connection, for a thread that must not wait for the main thread's calls.
        """
        mine, store = f"{self.place.rank} {status}", store or self.store
        if store is not None:
            try:
                first = store.compare_set(SAID, "", mine).decode()
                return None if first == mine else int(first.split()[1])
            except RuntimeError:  # who kept the store may have gone
                pass
        if self.place.notes is not None:
            try:
                (self.place.notes / SAID).open("x").close()
            except FileExistsError:
                return status
            except OSError:  # better twice than not at all
                return None
        return None

    def _wait_for_others(self) -> None:
        if self.store is None:
            return
        end = time.monotonic() + WAIT_SECONDS
        with suppress(RuntimeError):
            while time.monotonic() < end and not self.store.check([SAID]):
                time.sleep(0.05)


def say_apart(line: str) -> None:
    """Print a line beside the progress bar that another process may be drawing, and no longer ends."""
    print(f"{_new_line()}recforge: {line}", file=sys.stderr, flush=True)


def _new_line() -> str:
    return "\r\033[K" if sys.stderr.isatty() else "\n"


def _is_lost_connection(error: BaseException) -> bool:
    import torch.distributed as dist

    told = str(error).lower()
    return isinstance(error, dist.DistError | ConnectionError) or "gloo" in told or "connection" in told
