"""A trainer's place in a run: registered with the coordinator, heard of by heartbeats, and told when it is given up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.coordinator.answers import Chunk, Finished, Wait
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError

BEATS_PER_LEASE = 4


class LeaseLostError(ConnectionError):
    """The coordinator has given this trainer up, and its data to others; started again, it takes part again."""


class Membership:
    """A trainer that is registered, until it leaves.

    Args:
        client: of the coordinator.
        name: of the trainer.
        description: of the run as this trainer has it; that of the first one to register is the run's.

    Attributes:
        lease_seconds: within which a trainer has to be heard of; one that was killed counts as living so much longer.

    Raises:
        RefusedError: the coordinator has another run, and the message names what differs.
        ConnectionError: it cannot be reached.
    """

    def __init__(
        self,
        client: CoordinatorClient,
        name: str,
        description: RunDescription,
    ) -> None:
        self.client, self.name = client, name
        self.facts: Callable[[], dict[str, float]] = dict  # what each heartbeat tells
        registered = client.register("trainer", name, "", description.to_json())
        self.member, self.lease_seconds = registered.member, registered.lease_seconds
        self.description = RunDescription.from_json(registered.description_json or client.describe())
        self.last_clocks: dict[int, Callable[[], int]] = {}  # of lanes of its own, so that others may have them next
        self._lost: Exception | None = None
        self._left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._beating.start()

    def __enter__(self) -> Membership:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        self._beating.join()
        with suppress(ConnectionError, ValueError):  # who is not heard of any more has left as well
            self.client.leave(self.member, {lane: last_clock() for lane, last_clock in self.last_clocks.items()})

    def next_chunk(self) -> Chunk | Wait | Finished:
        """Ask for data."""
        with self._known():
            return self.client.next_chunk(self.member)

    def complete_chunk(self, chunk: Chunk) -> None:
        """Give data back, trained."""
        with self._known():
            self.client.complete_chunk(self.member, chunk.lane, chunk.lease, chunk.index)

    def pass_gate(self, batches: int) -> None:
        """Wait until nobody is too far behind."""
        with self._known():
            self.client.gate(self.member, batches, deadline_seconds=None)

    def is_oldest(self) -> bool:
        """Say whether no living trainer has registered before this one."""
        members = self.client.status().members
        return self.member <= min((m.member for m in members if m.alive and m.role == "trainer"), default=self.member)

    def count_trainers(self) -> int:
        """Return how many trainers live."""
        return max(1, sum(m.alive and m.role == "trainer" for m in self.client.status().members))

    def count_samples(self) -> int:
        """Return how many samples of the stream are trained, by all, in chunks that are complete."""
        return self.description.first_sample + self.client.status().samples_completed

    def mean_staleness(self) -> float | None:
        """Return how many other pushes a table had seen, in the mean, between a gradient's pull and its push."""
        facts = [member.facts for member in self.client.status().members if member.role == "shard"]
        pushes = sum(fact.get("pushes", 0.0) for fact in facts)
        return sum(fact.get("staleness_sum", 0.0) for fact in facts) / pushes if pushes else None

    def check(self) -> None:
        """Check that the coordinator has not given this trainer up, and is told that it lives.

        Raises:
            LeaseLostError: it has.
            Exception: what has ended the heartbeats.
        """
        if self._lost is not None:
            raise self._lost

    @contextmanager
    def _known(self) -> Iterator[None]:
        """Ask the coordinator something that it answers members only.

        Raises:
            LeaseLostError: this trainer is none any more, as it may hear before a heartbeat does.
        """
        self.check()
        try:
            yield
        except RefusedError as error:
            if error.refusal is Refusal.FAILED_PRECONDITION:
                raise self._given_up() from error
            raise

    def _given_up(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self.name}: expected to be heard of every {self.lease_seconds:g} seconds, was not, and others have "
            "taken over its data; nothing is lost: start it again"
        )

    def _beat(self) -> None:
        while not self._left.wait(self.lease_seconds / BEATS_PER_LEASE):
            try:
                known = self.client.heartbeat(self.member, self.facts()).known
            except ConnectionError:
                continue  # a coordinator that is started again goes on from its disk
            except Exception as error:
                self._lost = error
                return
            if not known:
                self._lost = self._given_up()
                return
