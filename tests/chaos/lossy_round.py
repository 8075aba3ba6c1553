"""A round of chaos in which shards keep snapshots only: what a kill takes is counted, and the count is the true one.

What is lost is found in the rows themselves. A lane's rows are the sum, over its pushes, of gradients that are known,
each times one or zero; there are many more numbers than pushes, so that these ones and zeros follow from the rows.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from chaos_round import Chaos, HandPusher
from cluster import Cluster, wait_until
from numpy.typing import NDArray
from sum_job import hand_gradients, hand_ids

from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.description import RunDescription
from parameter_server.partition import buckets_of, salt_of

_LANES = 3


class SteadyHands:
    """Lanes that push all the time, so that some pushes are under way whenever a shard is killed.

    Args:
        client: Of the coordinator.
        description: Of the run.
        pause_seconds: Between a lane's pushes.
    """

    def __init__(self, client: GrpcCoordinatorClient, description: RunDescription, pause_seconds: float) -> None:
        self.pushers = [HandPusher(client, description, f"steady-{number}") for number in range(_LANES)]
        self._pause_seconds, self._is_over = pause_seconds, threading.Event()
        self._thread = threading.Thread(target=self._push, name="steady hands", daemon=True)
        self._thread.start()

    def _push(self) -> None:
        while not self._is_over.wait(self._pause_seconds):
            for pusher in self.pushers:
                pusher.push()
                pusher.keep_alive()

    def finish(self) -> None:
        """Pushes no more, and waits until everything is acknowledged."""
        self._is_over.set()
        self._thread.join()
        for pusher in self.pushers:
            for push in pusher.pushed:
                push.result(120)
            assert pusher.acknowledged == len(pusher.pushed) > 0

    def close(self) -> None:
        """Ends the clients."""
        self._is_over.set()
        self._thread.join()
        for pusher in self.pushers:
            pusher.close()


class Loss(NamedTuple):
    """Of all pushes, and of the frames that these are: a push of a table is one on each shard."""

    pushes: int
    lost_frames: int


def run_lossy_round(cluster: Cluster, description: RunDescription, draw: random.Random, until: float) -> Loss:
    """Kills shards until a time, and compares what they report with what is missing.

    Buckets do not move here: a push of a table is one frame on each shard then.
    """
    with contextlib.ExitStack() as stack:
        client = GrpcCoordinatorClient(cluster.address, deadline_seconds=60)
        stack.callback(client.close)
        hands = SteadyHands(client, description, pause_seconds=0.1)
        stack.callback(hands.close)
        chaos = Chaos(cluster, draw.randrange(1 << 30))
        events = (chaos.kill_shard, chaos.snapshot, lambda: chaos.pause("shard", 0.6), chaos.kill_coordinator)
        while True:
            time.sleep(0.3 + draw.random() * 1.5)
            draw.choices(events, (4, 4, 1, 1))[0]()
            cluster.check_alive()
            if time.monotonic() > until:
                break
        chaos.settle()
        reached = [pusher.acknowledged + 3 for pusher in hands.pushers]
        # So that there is something to lose, however slow the machine is.
        wait_until(
            lambda: all(pusher.acknowledged >= count for pusher, count in zip(hands.pushers, reached, strict=True)),
            "acknowledged pushes",
        )
        chaos.kill_shard()
        hands.finish()
        lost = sum(count_lost(client, pusher) for pusher in hands.pushers)
        told = -1.0

        def is_told() -> bool:
            nonlocal told
            told = sum(m.facts.get("lost_pushes", 0.0) for m in client.status().members if m.role == "shard")
            return told == lost

        try:
            wait_until(is_told, f"a reported loss of {lost} frames", 60)
        except AssertionError as error:
            raise AssertionError(f"{error}, got {told}; {chaos.happened}") from None
        return Loss(sum(len(pusher.pushed) for pusher in hands.pushers), lost)


def count_lost(client: GrpcCoordinatorClient, pusher: HandPusher) -> int:
    """Counts the frames that are acknowledged and not in the rows; no push is there in part on one shard, or twice."""
    owners, lost = client.routes().owners, 0
    clocks = pusher.clocks(len(pusher.pushed))
    pushes = [hand_gradients(pusher.lane.lane, clock) for clock in clocks]
    for table, config in enumerate(pusher.description.tables):
        ids = hand_ids(pusher.lane.lane, table)
        found = pusher.rows.pull([(table, ids)]).result(60)[0].rows
        gradients = [given[table][2] for given in pushes]
        shards = owners[buckets_of(ids, salt_of(config.name))]
        for shard in np.unique(shards).tolist():
            here = shards == shard
            lost += _count_missing(
                found[here], [of_push[here] for of_push in gradients], f"shard {shard}, {config.name}"
            )
    return lost


def _count_missing(found: NDArray[np.float32], gradients: Sequence[NDArray[np.float32]], told: str) -> int:
    """Says how many pushes [n, dim] are not in rows [n, dim] that began as zeros, at a learning rate of 1."""
    matrix = np.stack([of_push.reshape(-1) for of_push in gradients], axis=1).astype(np.float64)
    assert len(matrix) > len(gradients), f"{told}: too many pushes to tell them apart"
    solved, _, rank, _ = np.linalg.lstsq(matrix, -found.reshape(-1).astype(np.float64), rcond=None)
    assert rank == len(gradients), f"{told}: pushes cannot be told apart"
    applied = np.rint(solved)
    assert (matrix @ applied == -found.reshape(-1)).all(), f"{told}: some rows of a push are there, and others are not"
    assert ((applied == 0) | (applied == 1)).all(), f"{told}: expected each push once at most, got {applied}"
    return int((applied == 0).sum())
