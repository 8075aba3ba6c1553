"""The coordinator's promises on members: numbers that stay, what a new start goes on from, and what it refuses."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parameter_server import limits as control_limits
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.control.routes_source import CoordinatorRoutes
from parameter_server.description import RunDescription
from parameter_server.errors import Refusal, RefusedError


def test_registration_compares_descriptions_and_versions(run: Any, described: RunDescription, refused: Any) -> None:
    other = replace(described, seed=1, run_id=99)
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
    assert run.register("trainer", "t", protocol=(1, 99)).description_json == described.to_json()
    for text in ("{}", "[]", "1", "{", "[" * 100_000, described.to_json().replace('"lanes": 4', '"lanes": 1e99')):
        refused(
            Refusal.INVALID_ARGUMENT, "expected", lambda text=text: run.register("trainer", "t", description_json=text)
        )
    refused(Refusal.INVALID_ARGUMENT, "role", lambda: run.register("boss", "t"))  # type: ignore[arg-type]
    refused(Refusal.INVALID_ARGUMENT, "name", lambda: run.register("trainer", "t" * 201))
    refused(Refusal.INVALID_ARGUMENT, "printable", lambda: run.register("trainer", "\x1b[2J"))
    refused(Refusal.INVALID_ARGUMENT, "address", lambda: run.register("shard", "s"))
    refused(Refusal.INVALID_ARGUMENT, "facts", lambda: run.heartbeat(1, {str(i): 0.0 for i in range(99)}))
    refused(Refusal.INVALID_ARGUMENT, "finite", lambda: run.heartbeat(1, {"x": float("nan")}))


def test_the_first_to_describe_the_run_decides(described: RunDescription, refused: Any, coordinate: Any) -> None:
    with closing(coordinate()) as run:
        shard = run.register("shard", "s", "local:0")
        assert (shard.description_json, shard.shard) == (None, 0)
        refused(Refusal.FAILED_PRECONDITION, "expected its description first", lambda: run.next_chunk(shard.member))
        told: list[str] = []
        waiting = threading.Thread(target=lambda: told.append(LocalCoordinatorClient(run).describe()))
        waiting.start()
        run.register("trainer", "t", description_json=replace(described, run_id=0).to_json())
        waiting.join(5)
        first = RunDescription.from_json(told[0])
        assert first.run_id > 0
        assert first == replace(described, run_id=first.run_id)


def test_shards_keep_their_numbers_and_routes_follow_addresses(described: RunDescription, coordinate: Any) -> None:
    with closing(coordinate(described, start_shards=2)) as run:
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


def test_two_processes_of_one_name_do_not_take_turns(
    described: RunDescription, time: Any, refused: Any, coordinate: Any
) -> None:
    with closing(coordinate(described, clock=time)) as run:
        first = run.register("shard", "a", "here:1").member
        second = run.register("shard", "a", "there:1").member
        assert not run.heartbeat(first).known
        refused(
            Refusal.FAILED_PRECONDITION,
            "shard a: expected one process of this name, got another since, at there:1; give each shard a --name",
            lambda: run.register("shard", "a", "here:1", former=first),
        )
        assert run.heartbeat(second).known
        time.seconds = 11
        again = run.register("shard", "a", "there:1", former=second)
        assert again.shard == 0
        assert run.register("shard", "a", "there:1", former=second).shard == 0  # the answer was lost on the way
        assert run.register("shard", "a", "here:1").shard == 0  # started again, elsewhere


def test_a_dead_shard_is_reported_and_keeps_its_buckets(time: Any, described: RunDescription, coordinate: Any) -> None:
    with closing(coordinate(described, clock=time)) as run:
        first = run.register("shard", "a", "local:0")
        run.heartbeat(first.member, {"rows": 5, "bytes": 100, "lost_pushes": 3})
        status = run.status()
        assert (status.rows, status.row_bytes, status.lost_pushes) == (5, 100, 3)
        run.heartbeat(first.member, {"rows": 1.7e308, "bytes": -1.0})  # a fault of its own, which stays its own
        assert (run.status().rows, run.status().row_bytes) == (1 << 62, 0)
        time.seconds = 11
        status = run.status()
        assert status.notes == ("shard 0 (a) is not heard of; 4096 buckets wait for it",)
        assert [(member.alive, member.buckets) for member in status.members] == [(False, 4096)]
        assert run.register("shard", "a", "local:0").shard == 0
        assert run.status().notes == ()


def test_a_shard_is_drained_once_all_know_it(described: RunDescription, refused: Any, coordinate: Any) -> None:
    with closing(coordinate(described)) as run:
        run.register("shard", "a", "local:0")
        refused(Refusal.FAILED_PRECONDITION, "another shard", lambda: run.drain(0))
        refused(Refusal.INVALID_ARGUMENT, "registered, got 5", lambda: run.drain(5))
        empty = run.register("shard", "b", "local:1")  # has no buckets yet
        trainer = run.join()
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


def test_heartbeats_bring_routes_and_tell_which_are_used(described: RunDescription, coordinate: Any) -> None:
    with closing(coordinate(described)) as run:
        client = LocalCoordinatorClient(run)
        client.register("shard", "a", "local:0")
        source = CoordinatorRoutes(client)
        member = run.join()
        client.heartbeat(member, {"batches": 1})
        client.register("shard", "a", "local:1")
        client.heartbeat(member)
        assert source.current().addresses == {0: "local:1"}
        client.heartbeat(member)
        assert run.members.require(member).route_epoch == source.current().epoch == 2


def test_a_restarted_coordinator_goes_on(tmp_path: Path, described: RunDescription, coordinate: Any) -> None:
    path = tmp_path / "run" / "coordinator.sqlite"
    with closing(coordinate(described, path=path)) as run:
        run.register("shard", "a", "local:0")
        member = run.join()
        done, held = run.take(member), run.take(member)
        run.complete(member, done)
        lane = run.client_lane(member)
        with pytest.raises(ValueError, match="expected no other coordinator"):
            coordinate(described, path=path)
    with closing(coordinate(path=path)) as run:
        assert run.description == described
        assert run.heartbeat(member).known
        assert run.routes() is not None
        run.complete(member, held)
        assert run.status().chunks_completed == 2
        assert run.take(member).index == 2
        assert run.join() == member + 1
        run.leave(member, {lane.lane: 5})
        assert run.client_lane(member + 1) == (lane.lane, lane.lease + 1, 6)
    with pytest.raises(ValueError, match="another batch_size"):
        coordinate(replace(described, batch_size=5), path=path)


def test_a_file_that_is_none_of_ours(tmp_path: Path, described: RunDescription, coordinate: Any) -> None:
    path = tmp_path / "coordinator.sqlite"
    path.write_bytes(b"no database, but a text that is long enough to be looked at" * 100)
    with pytest.raises(ValueError, match="expected the state of a coordinator"):
        coordinate(described, path=path)


@pytest.mark.parametrize(("version", "says"), [(2, "got 2"), (0, "got 0")])
def test_a_file_of_another_release_is_left_as_it_is(
    tmp_path: Path, described: RunDescription, coordinate: Any, version: int, says: str
) -> None:
    path = tmp_path / "state"
    with closing(sqlite3.connect(path)) as other:
        other.executescript(f"create table settings (other); pragma user_version = {version};")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"expected version 1 of a coordinator's state, {says}"):
        coordinate(described, path=path)
    assert path.read_bytes() == before


def test_a_file_that_is_damaged_is_one_line(tmp_path: Path, described: RunDescription, coordinate: Any) -> None:
    path = tmp_path / "state"
    with closing(coordinate(described, path=path)) as run:
        run.register("shard", "a", "local:0")
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)  # all pages but the first
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state: expected the state of a coordinator, got .*malformed") as error:
        coordinate(path=path)
    assert "\n" not in str(error.value)


def test_snapshots_keep_the_position_of_their_beginning(run: Any, refused: Any) -> None:
    refused(Refusal.FAILED_PRECONDITION, "shards that hold rows", lambda: run.begin_snapshot("one"))
    run.register("shard", "a", "local:0")
    member = run.join()
    first, second = run.take(member), run.take(member)
    run.complete(member, first)
    run.begin_snapshot("one")
    run.complete(member, second)
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
    member = run.join()
    again = run.take(member)
    assert (again.index, again.lane) == (second.index, second.lane)
    assert again.lease > second.lease
    assert run.status().chunks_completed == 1


def test_positions_of_snapshots_are_bounded_and_unfinished_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: RunDescription, coordinate: Any
) -> None:
    monkeypatch.setattr("parameter_server.coordinator.coordinator._SNAPSHOTS", 3)
    with closing(coordinate(described, path=tmp_path / "state")) as run:
        run.register("shard", "a", "local:0")
        for number in range(6):
            run.begin_snapshot(str(number))
            run.end_snapshot(str(number), finished=True)
        assert run.status().snapshots == ("3", "4", "5")
        run.begin_snapshot("cut short")
    with closing(coordinate(path=tmp_path / "state")) as run:
        assert run.state.snapshots()[-1].name == "5"
        run.begin_snapshot("cut short")


def test_members_are_bounded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_limits, "MAX_MEMBERS", 3)
    for _ in range(3):
        run.join()
    with pytest.raises(RefusedError, match="at most 3 at a time") as refused:
        run.join()
    assert refused.value.refusal is Refusal.RESOURCE_EXHAUSTED


def test_what_the_disk_refuses_has_not_happened(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    member = run.join()
    first = run.take(member)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run.state, "put_lane", fail)
        with pytest.raises(OSError, match="no space"):
            run.next_chunk(member)
        with pytest.raises(OSError, match="no space"):
            run.complete(member, first)
    assert run.status().chunks_completed == 0
    assert run.take(member).index == 1
    run.complete(member, first)
