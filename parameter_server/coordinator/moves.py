"""Moves buckets between shards while training goes on, and has shards write snapshots: the coordinator's own work.

A move: copy while pushes go on, copy what has changed since; freeze; copy the rest; the sender gives up its say; the
coordinator's state says whose the buckets are; both shards are told; the sender drops them. Whoever dies on the way,
what that state says is true: a shard that comes back, or a coordinator, settles by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from parameter_server.coordinator.answers import SnapshotTaken
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.move_plan import Move, plan_move
from parameter_server.errors import Refusal, RefusedError
from parameter_server.partition import Routes
from parameter_server.shard.control import ShardLink

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_RETRY_SECONDS = 1.0
FREEZE_SECONDS = 5.0  # after which a sender takes pushes again, unless it has been told to wait for the outcome
SHORT_FREEZE, LONG_FREEZE = 0.05, 0.3  # seconds: portions grow below the one, and shrink above the other
LARGEST_PORTION = 512
Step = Callable[[str], None]


class ShardKeeper:
    """Settles shards that come, tells them of new routes, and balances buckets among them, in a thread of its own.

    Args:
        coordinator: Is not closed with the keeper.
        connect: Opens the way to a shard at an address.
        portion: Buckets per move, to begin with.
        on_step: Told of each step of a move before it is taken; for tests.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        connect: Callable[[str], ShardLink],
        *,
        portion: int = 64,
        on_step: Step | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._connect = connect
        self._portion = portion
        self._on_step: Step = on_step or (lambda _: None)
        self._links: dict[str, ShardLink] = {}
        self._settled: dict[int, int] = {}  # of members that are shards: the epoch of routes that they know
        self._order = coordinator.start_number << 40
        self._busy = threading.RLock()  # a move, or a snapshot
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="shard keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after the step that it is at."""
        self._ends.set()
        with self._coordinator.changed:
            self._coordinator.changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for link in self._links.values():
            link.close()

    def snapshot(self, name: str = "") -> SnapshotTaken:
        """Has all shards that hold buckets write a snapshot, with the data's position as of its beginning.

        Args:
            name: By which it is restored; by default the time.

        Raises:
            RefusedError: There is one of this name, or a shard is missing or failed; there is no snapshot then.
            ConnectionLost: A shard did not answer.
        """
        name = name or time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 10**9:09d}"
        with self._busy:
            self._coordinator.begin_snapshot(name)
            finished = False
            try:
                self._each_shard(lambda link: link.snapshot())
                finished = True
            finally:
                taken = self._coordinator.end_snapshot(name, finished=finished)
            assert taken is not None
            return taken

    def step(self) -> bool:
        """Does what is to be done next, and says whether there was anything.

        Raises:
            RefusedError: It was not possible; it will be tried again.
            ConnectionLost: A shard did not answer.
        """
        with self._busy:
            routes, shards = self._known()
            if routes is None:
                return False
            self._tell(routes, shards)
            with self._coordinator.changed:
                receivers = self._coordinator.routing.receivers()
            move = plan_move(routes.owners, receivers, self._portion)
            members = {shard: (member, address) for shard, member, address in shards}
            if move is None or move.sender not in members or move.receiver not in members:
                return False
            (sender, sender_at), (receiver, receiver_at) = members[move.sender], members[move.receiver]
            self._move(replace(move, members=(sender, receiver)), sender_at, receiver_at)
            return True

    def _tell(self, routes: Routes, shards: list[tuple[int, int, str]]) -> None:
        """Settles shards that came, and tells the others of routes; one that does not answer holds up none of them."""
        trouble: Exception | None = None
        for _, member, address in shards:
            try:
                if member not in self._settled:
                    self._link(address).settle(self._next_order(), routes)
                elif self._settled[member] < routes.epoch:
                    self._link(address).set_routes(routes)
                self._settled[member] = routes.epoch
            except (RefusedError, ConnectionError) as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def _run(self) -> None:
        while not self._ends.is_set():
            wait = _LOOK_SECONDS
            try:
                wait = 0.0 if self.step() else _LOOK_SECONDS
                self._say("")
            except Exception as error:
                # Nothing is lost by a move that fails; but somebody should see it.
                trouble = f"moving buckets: {error}; tried again"
                if self._coordinator.figures.trouble != trouble:
                    _log.warning(
                        "moving buckets: %s", error, exc_info=not isinstance(error, RefusedError | ConnectionError)
                    )
                self._say(trouble)
                wait = _RETRY_SECONDS
            if wait:
                with self._coordinator.changed:
                    self._coordinator.changed.wait(wait)

    def _say(self, trouble: str) -> None:
        with self._coordinator.changed:
            self._coordinator.figures.trouble = trouble

    def _known(self) -> tuple[Routes | None, list[tuple[int, int, str]]]:
        run = self._coordinator
        with run.changed:
            living = [(m.shard, m.number, m.address) for m in run.members.of("shard") if m.shard is not None]
            members = {number for _, number, _ in living}
            self._settled = {member: epoch for member, epoch in self._settled.items() if member in members}
            routes = run.routing.routes
        for address in self._links.keys() - {address for *_, address in living}:
            self._links.pop(address).close()  # a shard that is started again is at another port
        return routes, living

    def _link(self, address: str) -> ShardLink:
        if address not in self._links:
            self._links[address] = self._connect(address)
        return self._links[address]

    def _each_shard(self, work: Callable[[ShardLink], None]) -> None:
        routes, shards = self._known()
        assert routes is not None  # begin_snapshot has looked
        living = {shard: address for shard, _, address in shards}
        owners = np.unique(routes.owners).tolist()
        if missing := sorted(set(owners) - living.keys()):
            raise RefusedError(Refusal.UNAVAILABLE, f"snapshot: expected all shards, but {missing[0]} is not heard of")
        for shard in owners:
            work(self._link(living[shard]))

    def _move(self, move: Move, sender_at: str, receiver_at: str) -> None:
        run, sender, receiver = self._coordinator, self._link(sender_at), self._link(receiver_at)
        description = run.description
        saves = description is not None and description.durability == "snapshot"
        run.figures.moving_buckets = int(move.buckets.sum())
        began = 0.0
        try:
            versions: list[int] = []
            for _ in range(2):  # the second pass is short, and the one under the freeze shorter still
                versions = self._copy(receiver, sender_at, move, versions, is_last=False)
            if saves:
                self._on_step("save")
                receiver.snapshot()  # so that the one under the freeze is short
            self._on_step("freeze")
            began = time.monotonic()
            freeze = self._next_order()
            sender.freeze(freeze, move.buckets, FREEZE_SECONDS)
            self._copy(receiver, sender_at, move, versions, is_last=True)
            if saves:
                receiver.snapshot()
            self._on_step("keep")
            sender.keep_frozen(freeze)
            self._on_step("commit")
            routes = run.commit_move(move)
        except BaseException:
            # Both settle before anything else: the sender takes pushes again, the receiver drops what it got.
            for member in move.members:
                self._settled.pop(member, None)
            raise
        finally:
            run.figures.moving_buckets = 0
        self._finish(move, routes, receiver, sender, began)

    def _finish(self, move: Move, routes: Routes, receiver: ShardLink, sender: ShardLink, began: float) -> None:
        figures = self._coordinator.figures
        figures.moves_done += 1
        for member in move.members:
            self._settled.pop(member, None)
        self._on_step("tell")
        receiver.set_routes(routes)
        frozen = time.monotonic() - began
        figures.longest_freeze_seconds = max(figures.longest_freeze_seconds, frozen)
        if frozen > LONG_FREEZE:
            self._portion = max(1, self._portion // 2)
        elif frozen < SHORT_FREEZE:
            self._portion = min(LARGEST_PORTION, self._portion * 2)
        self._settled[move.members[1]] = routes.epoch
        self._on_step("drop")
        sender.settle(self._next_order(), routes)
        self._settled[move.members[0]] = routes.epoch
        count = int(move.buckets.sum())
        _log.info("moved %d buckets from shard %d to %d, %.3f s frozen", count, move.sender, move.receiver, frozen)

    def _copy(self, receiver: ShardLink, sender_at: str, move: Move, since: list[int], *, is_last: bool) -> list[int]:
        self._on_step("copy")
        copied = receiver.copy(self._next_order(), sender_at, move.buckets, since, is_last=is_last)
        return copied.versions

    def _next_order(self) -> int:
        self._order += 1
        return self._order
