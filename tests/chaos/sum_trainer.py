"""A trainer of the sum test, in a thread or as a process of its own, which may be killed or stopped at any moment."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from sum_job import gradients_of

from dlrm.asynchronous.membership import LeaseLostError, Membership
from parameter_server.client.rows_client import LaneLease, Push, RowsClient
from parameter_server.control.coordinator_client import CoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.answers import Chunk, Finished, Wait
from parameter_server.description import RunDescription
from parameter_server.errors import LaneLostError, RefusedError
from parameter_server.transports import ShardConnection

# After each of these a trainer registers anew; what it had not completed is computed again by whoever gets it.
_SETBACKS = (LeaseLostError, LaneLostError, RefusedError, ConnectionError, TimeoutError)


def train(
    name: str,
    description: RunDescription,
    open_client: Callable[[], CoordinatorClient],
    connect: Callable[[str], ShardConnection],
    *,
    should_leave: Callable[[], bool] = lambda: False,
    pace: Callable[[], float] = lambda: 0.0,
) -> None:
    """Trains until all data are trained, or until told to leave, whatever happens to others.

    Args:
        name: For people.
        description: Of the run.
        open_client: Connects to the coordinator.
        connect: Connects to a shard.
        should_leave: Asked before each batch.
        pace: Seconds to wait after each batch.
    """
    is_finished = False
    while not (is_finished or should_leave()):
        try:
            client = open_client()
            try:
                with Membership(client, name, description) as membership:
                    rows = RowsClient(membership.description, CoordinatorRoutes(client), connect, deadline_seconds=60)
                    try:
                        is_finished = _work(membership, rows, should_leave, pace)
                    finally:
                        rows.close()
            finally:
                client.close()
        except _SETBACKS as error:
            print(f"{name}: begins anew: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(0.2)


def _work(
    membership: Membership, rows: RowsClient, should_leave: Callable[[], bool], pace: Callable[[], float]
) -> bool:
    """Returns whether all data are trained."""
    while not should_leave():
        given = membership.next_chunk()
        if isinstance(given, Finished):
            return True
        if isinstance(given, Wait):
            time.sleep(min(given.seconds, 0.1))
        elif not _train_chunk(given, rows, should_leave, pace):
            return False
        else:
            _insist(lambda: membership.complete_chunk(given))  # noqa: B023  # called at once
    return False


def _train_chunk(chunk: Chunk, rows: RowsClient, should_leave: Callable[[], bool], pace: Callable[[], float]) -> bool:
    pushed: list[Future[None]] = []
    for index, start in enumerate(range(0, chunk.num_samples, chunk.batch_size)):
        if should_leave():
            return False
        given = gradients_of(chunk.first_sample + start, min(chunk.batch_size, chunk.num_samples - start))
        pulled = rows.pull([(table, ids) for table, ids, _ in given]).result()
        for values in pulled:
            assert (values.rows == np.round(values.rows)).all(), "a row that no sum of pushes gives"
        pushes = [
            Push(table=table, ids=ids, gradients=gradients, versions=values.versions)
            for (table, ids, gradients), values in zip(given, pulled, strict=True)
        ]
        pushed.append(rows.push(LaneLease(chunk.lane, chunk.lease), chunk.first_clock + index, pushes))
        time.sleep(pace())
    for push in pushed:
        push.result()
    return True


def _insist(ask: Callable[[], None]) -> None:
    """Asks the coordinator again while it is away."""
    for _ in range(100):
        try:
            return ask()
        except ConnectionError:
            time.sleep(0.1)
    return ask()


def main() -> None:
    """Run as a process until the data are trained; SIGTERM asks it to leave."""
    from parameter_server.control.coordinator_client import GrpcCoordinatorClient
    from parameter_server.transports import GrpcConnection

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--description", type=Path, required=True)
    parser.add_argument("--pace-seconds", type=float, default=0.0)
    parser.add_argument("--hurry", type=Path, required=True, help="once this file exists, there is no pace")
    arguments = parser.parse_args()
    leaves = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leaves.set())
    train(
        arguments.name,
        RunDescription.from_json(arguments.description.read_text()),
        lambda: GrpcCoordinatorClient(arguments.coordinator),
        lambda address: GrpcConnection(address, call_seconds=3.0),
        should_leave=leaves.is_set,
        pace=lambda: 0.0 if arguments.hurry.exists() else arguments.pace_seconds,
    )


if __name__ == "__main__":
    main()
