"""The coordinator's promises on members: numbers that stay, what a new start goes on from, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.tables import TableConfig
from parameter_server import limits as control_limits
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.coordinator.answers import Chunk
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError

RUN = RunDescription(
    run_id=7,
    seed=0,
    tables=(TableConfig(name="t", num_rows=10, dim=4, features=("f",)),),
    lanes=4,
    staleness=1,
    samples=200,
    epoch_samples=90,
    batch_size=4,
    chunk_batches=3,
)


def refused(refusal: Refusal, message: str, call: Callable[[], object]) -> None:
    with pytest.raises(RefusedError, match=message) as error:
        call()
    assert error.value.refusal is refusal


def join(run: Coordinator, name: str = "t") -> int:
    return run.register("trainer", name, description_json=RUN.to_json()).member


def take(run: Coordinator, member: int) -> Chunk:
    chunk = run.next_chunk(member)
    assert isinstance(chunk, Chunk)
    return chunk


def complete(run: Coordinator, member: int, chunk: Chunk) -> None:
    run.complete_chunk(member, chunk.lane, chunk.lease, chunk.index)


def test_registration_compares_descriptions_and_versions(run: Coordinator) -> None:
    other = replace(RUN, seed=1, run_id=99)
    refused(
        Refusal.FAILED_PRECONDITION,
        r"another seed \(0 here, 1 there\)",
        lambda: run.register("trainer", "t", description_json=other.to_json()),
    )
    refused(
        Refusal.FAILED_PRECONDITION,
        r"expected major version 1 \(the coordinator speaks 1\.\d+\), got 2\.0",
        lambda: run.register("trainer", "t", protocol=(2, 0)),
    )
    assert run.register("trainer", "t", protocol=(1, 99)).description_json == RUN.to_json()
    for text in ("{}", "[]", "1", "{", "[" * 100_000, RUN.to_json().replace('"lanes": 4', '"lanes": 1e99')):
        refused(
            Refusal.INVALID_ARGUMENT, "expected", lambda text=text: run.register("trainer", "t", description_json=text)
        )
    refused(Refusal.INVALID_ARGUMENT, "role", lambda: run.register("boss", "t"))  # type: ignore[arg-type]
    refused(Refusal.INVALID_ARGUMENT, "name", lambda: run.register("trainer", "t" * 201))
    refused(Refusal.INVALID_ARGUMENT, "printable", lambda: run.register("trainer", "\x1b[2J"))
    refused(Refusal.INVALID_ARGUMENT, "address", lambda: run.register("shard", "s"))
    refused(Refusal.INVALID_ARGUMENT, "facts", lambda: run.heartbeat(1, {str(i): 0.0 for i in range(99)}))
    refused(Refusal.INVALID_ARGUMENT, "finite", lambda: run.heartbeat(1, {"x": float("nan")}))


def test_the_first_to_describe_the_run_decides() -> None:
    with closing(Coordinator()) as run:
        shard = run.register("shard", "s", "local:0")
        assert (shard.description_json, shard.shard) == (None, 0)
        refused(Refusal.FAILED_PRECONDITION, "expected its description first", lambda: run.next_chunk(shard.member))
        told: list[str] = []
        waiting = threading.Thread(target=lambda: told.append(LocalCoordinatorClient(run).describe()))
        waiting.start()
        run.register("trainer", "t", description_json=replace(RUN, run_id=0).to_json())
        waiting.join(5)
        described = RunDescription.from_json(told[0])
        assert described.run_id > 0
        assert described == replace(RUN, run_id=described.run_id)


def test_shards_keep_their_numbers_and_routes_follow_addresses() -> None:
    with closing(Coordinator(RUN, start_shards=2)) as run:
        assert run.register("shard", "a", "local:0").routes is None
        second = run.register("shard", "b", "local:1")
        assert second.shard == 1
        assert second.routes is not None
        source = CoordinatorRoutes(LocalCoordinatorClient(run))
        assert np.bincount(source.current().owners).tolist() == [2048, 2048]
        assert run.routes(source.current().epoch) is None
        back = run.register("shard", "a", "local:9")
        assert back.shard == 0
        newer = source.newer_than(source.current().epoch)
        assert (newer.epoch, newer.addresses) == (2, {0: "local:9", 1: "local:1"})
        assert not run.heartbeat(1).known  # the earlier process of shard a
        joined = run.register("shard", "c", "local:2")
        assert joined.shard == 2
        assert joined.routes is not None
        assert not joined.routes.owned_by(2).any()


def test_a_dead_shard_is_reported_and_keeps_its_buckets(time: Any) -> None:
    with closing(Coordinator(RUN, clock=time)) as run:
        first = run.register("shard", "a", "local:0")
        run.heartbeat(first.member, {"rows": 5, "bytes": 100, "lost_pushes": 3})
        status = run.status()
        assert (status.rows, status.row_bytes, status.lost_pushes) == (5, 100, 3)
        time.seconds = 11
        status = run.status()
        assert status.notes == ("shard 0 (a) is not heard of; 4096 buckets wait for it",)
        assert [(member.alive, member.buckets) for member in status.members] == [(False, 4096)]
        assert run.register("shard", "a", "local:0").shard == 0
        assert run.status().notes == ()


def test_a_shard_is_drained_once_all_know_it() -> None:
    with closing(Coordinator(RUN)) as run:
        run.register("shard", "a", "local:0")
        refused(Refusal.FAILED_PRECONDITION, "another shard", lambda: run.drain(0))
        refused(Refusal.INVALID_ARGUMENT, "registered, got 5", lambda: run.drain(5))
        empty = run.register("shard", "b", "local:1")  # has no buckets yet
        trainer = join(run)
        assert not run.heartbeat(empty.member).may_end
        for member in (1, trainer):
            run.heartbeat(member, {"route_epoch": 1})
        run.drain(1)
        assert not run.heartbeat(empty.member).may_end
        epoch = run.heartbeat(1).route_epoch
        run.heartbeat(1, {"route_epoch": epoch})
        assert not run.heartbeat(empty.member).may_end
        run.heartbeat(trainer, {"route_epoch": epoch})
        assert run.heartbeat(empty.member).may_end
        routes = run.routes()
        assert routes is not None
        assert set(routes.addresses) == {0}


def test_heartbeats_bring_routes_and_tell_which_are_used() -> None:
    with closing(Coordinator(RUN)) as run:
        client = LocalCoordinatorClient(run)
        client.register("shard", "a", "local:0")
        source = CoordinatorRoutes(client)
        member = join(run)
        client.heartbeat(member, {"batches": 1})
        client.register("shard", "a", "local:1")
        client.heartbeat(member)
        assert source.current().addresses == {0: "local:1"}
        client.heartbeat(member)
        assert run.members.require(member).route_epoch == source.current().epoch == 2


def test_a_restarted_coordinator_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run" / "coordinator.sqlite"
    with closing(Coordinator(RUN, path=path)) as run:
        run.register("shard", "a", "local:0")
        member = join(run)
        done, held = take(run, member), take(run, member)
        complete(run, member, done)
        lane = run.client_lane(member)
        with pytest.raises(ValueError, match="expected no other coordinator"):
            Coordinator(RUN, path=path)
    with closing(Coordinator(path=path)) as run:
        assert run.description == RUN
        assert run.heartbeat(member).known
        assert run.routes() is not None
        complete(run, member, held)
        run.progress(member, lane.lane, lane.lease, 5)
        assert run.status().chunks_completed == 2
        assert take(run, member).index == 2
        assert join(run) == member + 1
    with pytest.raises(ValueError, match="another batch_size"):
        Coordinator(replace(RUN, batch_size=5), path=path)


def test_a_file_that_is_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.sqlite"
    path.write_bytes(b"no database, but a text that is long enough to be looked at" * 100)
    with pytest.raises(ValueError, match="expected the state of a coordinator"):
        Coordinator(RUN, path=path)


def test_snapshots_keep_the_position_of_their_beginning(run: Coordinator) -> None:
    refused(Refusal.FAILED_PRECONDITION, "shards that hold rows", lambda: run.begin_snapshot("one"))
    run.register("shard", "a", "local:0")
    member = join(run)
    first, second = take(run, member), take(run, member)
    complete(run, member, first)
    run.begin_snapshot("one")
    complete(run, member, second)
    refused(Refusal.INVALID_ARGUMENT, "finished snapshot", lambda: run.restore("one"))
    taken = run.end_snapshot("one", finished=True)
    assert taken is not None
    assert taken.completed_chunks == 1
    refused(Refusal.INVALID_ARGUMENT, "a new name", lambda: run.begin_snapshot("one"))
    run.begin_snapshot("two")
    run.end_snapshot("two", finished=False)
    assert run.status().snapshots == ("one",)
    refused(Refusal.FAILED_PRECONDITION, "expected no trainer", lambda: run.restore("one"))
    run.leave(member)
    run.restore("one")
    member = join(run)
    again = take(run, member)
    assert (again.index, again.lane) == (second.index, second.lane)
    assert again.lease > second.lease
    assert run.status().chunks_completed == 1


def test_positions_of_snapshots_are_bounded_and_unfinished_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parameter_server.coordinator.coordinator._SNAPSHOTS", 3)
    with closing(Coordinator(RUN, path=tmp_path / "state")) as run:
        run.register("shard", "a", "local:0")
        for number in range(6):
            run.begin_snapshot(str(number))
            run.end_snapshot(str(number), finished=True)
        assert run.status().snapshots == ("3", "4", "5")
        run.begin_snapshot("cut short")
    with closing(Coordinator(path=tmp_path / "state")) as run:
        assert run.state.snapshots()[-1].name == "5"
        run.begin_snapshot("cut short")


def test_members_are_bounded(run: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_limits, "MAX_MEMBERS", 3)
    for _ in range(3):
        join(run)
    refused(Refusal.RESOURCE_EXHAUSTED, "at most 3 at a time", lambda: join(run))


def test_what_the_disk_refuses_has_not_happened(run: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    member = join(run)
    first = take(run, member)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run.state, "put_lane", fail)
        with pytest.raises(OSError, match="no space"):
            run.next_chunk(member)
        with pytest.raises(OSError, match="no space"):
            complete(run, member, first)
    assert run.status().chunks_completed == 0
    assert take(run, member).index == 1
    complete(run, member, first)
