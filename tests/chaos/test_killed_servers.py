"""Real processes, killed and stopped at any moment: no acknowledged push is lost, none is applied twice or in part.

The short form runs in the default suite. The long one, with everything at once, is a command of its own::

    pytest tests/chaos/test_killed_servers.py -m long --chaos-minutes 5

Where a round fails, it has said what happened; `--chaos-seed <n>` draws the same again.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from byte_proxy import ByteFaults
from chaos_round import Chaos, HandPusher, Hands, assert_sums, connect
from cluster import COLD_SECONDS, Cluster, wait_until
from lossy_round import run_lossy_round
from message_proxy import MessageFaults
from sum_job import describe, hand_ids, hand_rows

from parameter_server.client.rows_client import RowsClient
from parameter_server.control.coordinator_client import GrpcCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.answers import MemberStatus
from parameter_server.description import RunDescription
from parameter_server.partition import buckets_of, salt_of

FAULTS = [
    None,
    MessageFaults(drop_request=0.03, drop_reply=0.03, duplicate=0.05, late=0.05, delay=0.1, hang=0.1),
    ByteFaults(reset=0.7, reset_bytes=2 << 20, delay=0.02, delay_seconds=0.02, silence=0.2, silence_seconds=1.0),
]


def begin(cluster: Cluster, faults: list[ByteFaults | MessageFaults | None], trainers: int) -> None:
    cluster.start_coordinator(len(faults))
    for number, of_shard in enumerate(faults):
        cluster.start_shard(number, of_shard)
    for number in range(trainers):
        cluster.start_trainer(number)


def described(cluster: Cluster) -> RunDescription:
    """The run's description, once it is under way."""
    client = GrpcCoordinatorClient(cluster.address, deadline_seconds=60)
    try:
        found = RunDescription.from_json(client.describe(deadline_seconds=COLD_SECONDS))
        client.routes(deadline_seconds=COLD_SECONDS)
        wait_until(lambda: client.status().chunks_completed > 0 or not found.samples, "a first chunk", COLD_SECONDS)
    finally:
        client.close()
    return found


def check_sums(cluster: Cluster, description: RunDescription, told: str) -> int:
    """Compares all rows; returns how many."""
    client = GrpcCoordinatorClient(cluster.address, deadline_seconds=60)
    rows = RowsClient(description, CoordinatorRoutes(client), connect, deadline_seconds=60)
    try:
        return assert_sums(rows, description.samples, told)
    finally:
        rows.close()
        client.close()


def test_the_sum_is_right_though_everybody_is_killed(folder: Path) -> None:
    with Cluster(folder, describe(samples=16_000), seed=1, pace_seconds=0.02) as cluster:
        begin(cluster, [None, None], trainers=2)
        description = described(cluster)
        hands = Hands(cluster, description)
        chaos = Chaos(cluster, seed=1)
        try:
            for event in (chaos.kill_shard, chaos.kill_trainer, chaos.kill_coordinator, chaos.kill_shard):
                event()
                time.sleep(0.5)
                cluster.check_alive()
            chaos.pause("trainer", 2.0)
            chaos.exchange_trainers()
            cluster.hurry()
            chaos.settle()
            cluster.wait_for_trainers(100)
            hands.check("killed")
            assert check_sums(cluster, description, "killed") > 0
        finally:
            hands.close()


def test_a_killed_shard_without_a_journal_reports_what_it_has_lost(folder: Path) -> None:
    wanted = describe(samples=0, durability="snapshot")
    with Cluster(folder, wanted, seed=1) as cluster, contextlib.ExitStack() as stack:
        cluster.start_coordinator(2)
        client = GrpcCoordinatorClient(cluster.address, deadline_seconds=60)
        stack.callback(client.close)
        client.register("client", "test", "", wanted.to_json())
        for number in range(2):
            cluster.start_shard(number)
        pusher = HandPusher(client, described(cluster))
        stack.callback(pusher.close)
        pusher.push(10)
        pusher.rows.wait()
        client.snapshot()
        kept: dict[str, set[int]] = {"shard-0": set(), "shard-1": set(range(1, 18))}
        kept["shard-0"] |= set(range(1, 11))
        pusher.push(7)
        pusher.rows.wait()
        for more in (0, 3):  # lost since the snapshot; and then once more, with what came since the restart
            pusher.push(more)
            pusher.rows.wait()
            kept["shard-1"] |= set(range(18, 18 + more))
            cluster.kill("shard-0")
            cluster.start_again("shard-0")
            lost = len(pusher.description.tables) * (len(pusher.pushed) - len(kept["shard-0"]))
            wait_until(lambda: told_loss(client, "shard-0") == lost, f"a reported loss of {lost}")  # noqa: B023
            assert_kept(client, pusher, kept)
            assert told_loss(client, "shard-1") == 0
            assert client.status().lost_pushes == lost


def told_loss(client: GrpcCoordinatorClient, name: str) -> float | None:
    """What a shard reports, once it is back."""
    return shard_of(client, name).facts.get("lost_pushes")


def shard_of(client: GrpcCoordinatorClient, name: str) -> MemberStatus:
    return next(member for member in client.status().members if member.name == name)


def assert_kept(client: GrpcCoordinatorClient, pusher: HandPusher, kept: dict[str, set[int]]) -> None:
    """Each shard's rows are the sums of certain pushes."""
    routes = client.routes()
    numbers = {name: shard_of(client, name).shard for name in kept}
    for table, config in enumerate(pusher.description.tables):
        ids = hand_ids(pusher.lane.lane, table)
        owners = routes.owners[buckets_of(ids, salt_of(config.name))]
        found = pusher.rows.pull([(table, ids)]).result(60)[0].rows
        for name, clocks in kept.items():
            expected = hand_rows(pusher.lane.lane, clocks)[table]
            here = owners == numbers[name]
            assert (found[here] == expected[here]).all(), f"{name}, table {table}: {pusher.acknowledged} acknowledged"


def register(cluster: Cluster, description: RunDescription) -> None:
    """Says what the run is of, where no trainer does."""
    client = GrpcCoordinatorClient(cluster.address, deadline_seconds=COLD_SECONDS)
    try:
        client.register("client", "test", "", description.to_json())
    finally:
        client.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_loss_is_reported_truly_though_pushes_are_under_way(folder: Path) -> None:
    wanted = describe(samples=0, durability="snapshot")
    with Cluster(folder, wanted, seed=2) as cluster:
        begin(cluster, [None, None], trainers=0)
        register(cluster, wanted)
        loss = run_lossy_round(cluster, described(cluster), random.Random(2), time.monotonic() + 3)
        assert loss.lost_frames > 0


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_sum_is_right_in_many_rounds(chaos_minutes: float, chaos_seed: int) -> None:
    warm_up()
    end = time.monotonic() + 60 * chaos_minutes
    for seed in range(chaos_seed, chaos_seed + 10_000):
        if time.monotonic() > end:
            break
        print(f"round with seed {seed}", flush=True)
        made = Path(tempfile.mkdtemp(prefix="chaos"))
        compared = run_round(made, seed, seconds=min(40.0, max(10.0, end - time.monotonic())))
        assert compared > 0, f"round with seed {seed}: nothing was compared"
        shutil.rmtree(made)  # what a failing round leaves is kept


def warm_up() -> None:
    """Has kernels compiled, which takes longer than anything that is waited for."""
    made = Path(tempfile.mkdtemp(prefix="chaos"))
    with Cluster(made, describe(samples=640), seed=1) as cluster:
        begin(cluster, [None], trainers=1)
        described(cluster)
        cluster.wait_for_trainers(COLD_SECONDS)
    shutil.rmtree(made)


def run_round(folder: Path, seed: int, seconds: float) -> int:
    """Has everything happen; returns how many rows were compared, or pushes where shards may lose some."""
    draw = random.Random(seed)
    told = f"round with seed {seed}, files in {folder}"
    if draw.random() < 0.4:
        wanted = describe(samples=0, durability="snapshot")
        with Cluster(folder, wanted, seed=seed) as cluster:
            begin(cluster, [draw.choice(FAULTS) for _ in range(2)], trainers=0)
            register(cluster, wanted)
            loss = run_lossy_round(cluster, described(cluster), draw, time.monotonic() + min(seconds, 20.0))
            print(f"{told}: {loss.lost_frames} frames lost, as reported", flush=True)
        return loss.pushes
    staleness = draw.choice([None, None, 3])
    with Cluster(folder, describe(samples=60_000, staleness=staleness), seed=seed, pace_seconds=0.05) as cluster:
        begin(cluster, [draw.choice(FAULTS) for _ in range(2)], trainers=draw.randint(2, 3))
        description = described(cluster)
        hands = Hands(cluster, description)
        chaos = Chaos(cluster, seed)
        try:
            chaos.happen(time.monotonic() + seconds)
            cluster.hurry()
            chaos.settle()
            cluster.wait_for_trainers(180)
            hands.check(told)
            return check_sums(cluster, description, told)
        finally:
            hands.close()
