"""One progress display for all members of a run: what the coordinator knows of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

from dlrm.asynchronous.stages import describe_stage

if TYPE_CHECKING:
    from parameter_server.control.coordinator_client import CoordinatorClient
    from parameter_server.coordinator.answers import Status

ASK_SECONDS = 1.0  # between two questions to the coordinator
PATIENCE_SECONDS = 1.0  # for its answer
ROW_FACTS = ("pulled_rows", "pushed_rows")  # that shards tell with their heartbeats


class CrewProgress:
    """A progress bar over the samples of the whole stream, with the trainers' loss and the shards' rows per second.

    Args:
        address: of the coordinator, which may come and go.
        connect: gives a client of it.
        shards: how many were started.
    """

    def __init__(
        self, address: str, connect: Callable[[str], CoordinatorClient] | None = None, *, shards: int = 1
    ) -> None:
        self._shards = shards
        self._client = (connect or _connect)(address)
        self._asked = float("-inf")
        self._rows: tuple[float, float] | None = None  # when, how many
        self._bar = tqdm(
            total=None,
            unit=" samples",
            unit_scale=True,
            desc="starting",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> CrewProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        self._client.close()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(f"recforge: {line}", file=sys.stderr)

    def show(self, *, at_once: bool = False) -> None:
        """Ask how the run goes, and show it; not more often than makes sense unless `at_once`."""
        now = time.monotonic()
        if not at_once and now - self._asked < ASK_SECONDS:
            return
        self._asked = now
        with suppress(ConnectionError, TimeoutError, ValueError):  # it is not there yet, or is being started again
            self._draw(self._client.status(), now)

    def _draw(self, status: Status, now: float) -> None:
        self._bar.set_description(describe_stage(status, self._shards))
        if not status.samples:
            return
        if self._bar.total is None:
            # Samples of an earlier start say nothing about the rate of this one.
            self._bar.reset(total=status.samples)
            self._bar.initial = self._bar.n = status.samples_completed
        remarks = []
        losses = [m.facts["loss"] for m in status.members if m.role == "trainer" and "loss" in m.facts]
        if losses:
            remarks.append(f"loss={sum(losses) / len(losses):.4f}")
        rows = sum(m.facts.get(fact, 0.0) for m in status.members if m.role == "shard" for fact in ROW_FACTS)
        if self._rows is not None and rows >= self._rows[1] and now > self._rows[0]:
            remarks.append(f"{(rows - self._rows[1]) / (now - self._rows[0]):,.0f} rows/s")
        self._rows = now, rows
        if status.lost_pushes:
            remarks.append(f"{status.lost_pushes:,} pushes lost")
        self._bar.set_postfix_str(", ".join(remarks), refresh=False)
        self._bar.update(max(0, status.samples_completed - self._bar.n))


def _connect(address: str) -> CoordinatorClient:
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.processes.config import ClientConfig

    return GrpcCoordinatorClient(address, ClientConfig().client_security, deadline_seconds=PATIENCE_SECONDS)
