"""A run whose processes have ended or were killed goes on with other shards: every sample counts once, in all rows."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from chaos_round import assert_sums, connect
from cluster import Cluster, wait_until
from sum_job import describe

from parameter_server.client.rows_client import RowsClient
from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.going_on import go_on
from parameter_server.description import RunDescription

SAMPLES = 6_000


def asked(cluster: Cluster) -> closing[GrpcCoordinatorClient]:
    return closing(GrpcCoordinatorClient(cluster.address, deadline_seconds=60))


def begin(cluster: Cluster, numbers: range, trainer: int) -> None:
    cluster.start_coordinator(len(numbers))
    for number in numbers:
        cluster.start_shard(number)
    cluster.start_trainer(trainer)


def wait_for_chunks(cluster: Cluster, chunks: int) -> None:
    with asked(cluster) as client:
        client.describe(deadline_seconds=60)
        client.routes(deadline_seconds=60)
        wait_until(lambda: client.status().chunks_completed >= chunks, f"{chunks} chunks")


def check(cluster: Cluster, samples: int, shards: set[str]) -> None:
    """All data are trained, rows are their sums, and lie on the shards that were asked for."""
    with asked(cluster) as client:
        description = RunDescription.from_json(client.describe())
        wait_until(lambda: {m.name for m in client.status().members if m.buckets} == shards, f"rows on {shards}")
        status = client.status()
        assert (status.samples_completed, status.lost_pushes) == (samples, 0)
        with closing(RowsClient(description, CoordinatorRoutes(client), connect, deadline_seconds=60)) as rows:
            assert_sums(rows, samples, "with other shards")


def resume(cluster: Cluster, count: int, *, goes_back: bool = False) -> None:
    """Starts what `recforge ps up` would start."""
    state = cluster.folder / "coordinator" / "coordinator.sqlite"
    found = go_on(state, [f"shard-{number}" for number in range(count)], goes_back=goes_back)
    cluster.start_coordinator(count)
    for name in found.shards:
        cluster.start_shard(int(name.removeprefix("shard-")))


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.long)])
def test_killed_shards_become_others_by_hand(folder: Path, count: int) -> None:
    with Cluster(folder, describe(samples=SAMPLES), seed=1, pace_seconds=0.02) as cluster:
        begin(cluster, range(2), trainer=0)
        wait_for_chunks(cluster, 3)
        cluster.kill_all()
        old = [folder / "shard-0", folder / "shard-1"]
        cluster.hurry()
        cluster.start_coordinator(count, "--forget-shards", "shard-0", "shard-1")
        for number in range(2, 2 + count):
            cluster.start_shard(number, None, "--restore-from", *old)
        cluster.start_trainer(1)
        cluster.wait_for_trainers(100)
        check(cluster, SAMPLES, {f"shard-{number}" for number in range(2, 2 + count)})


@pytest.mark.long
@pytest.mark.parametrize("durability", ["journal", "snapshot"])
def test_killed_runs_go_on_with_more_and_with_fewer_shards(folder: Path, durability: str) -> None:
    samples = 5 * SAMPLES
    wanted = describe(samples=samples, durability="journal" if durability == "journal" else "snapshot")
    with Cluster(folder, wanted, seed=1, pace_seconds=0.01) as cluster:
        begin(cluster, range(2), trainer=0)
        wait_for_chunks(cluster, 4)
        with asked(cluster) as client:
            client.snapshot()
        wait_for_chunks(cluster, 12)
        cluster.kill_all()
        resume(cluster, 3, goes_back=True)
        cluster.start_trainer(1)
        with asked(cluster) as client:
            wait_until(lambda: client.status().moves_done > 2, "rows on their way to the third")
        cluster.kill_all()  # in the middle of moves
        resume(cluster, 1, goes_back=True)
        cluster.start_trainer(2)
        cluster.hurry()
        cluster.wait_for_trainers(200)
        if durability == "journal":
            check(cluster, samples, {"shard-0"})
        else:
            check_recovered(cluster, samples)


def check_recovered(cluster: Cluster, samples: int) -> None:
    """Pushes were lost with the killed shards, and have come again: rows are right, whatever is counted as lost."""
    with asked(cluster) as client:
        description = RunDescription.from_json(client.describe())
        wait_until(lambda: {m.name for m in client.status().members if m.buckets} == {"shard-0"}, "rows on one shard")
        assert client.status().samples_completed == samples
        with closing(RowsClient(description, CoordinatorRoutes(client), connect, deadline_seconds=60)) as rows:
            assert_sums(rows, samples, "after a way back")
