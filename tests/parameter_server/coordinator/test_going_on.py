"""A run goes on with other shards and from where its rows are: what its coordinator's state says before any starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from embeddings.tables import TableConfig
from parameter_server.coordinator.answers import Chunk
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.going_on import GoingOn, go_on
from parameter_server.description import RunDescription
from parameter_server.errors import RefusedError

RUN = RunDescription(
    run_id=3,
    seed=0,
    tables=(TableConfig(name="t", num_rows=10, dim=2),),
    durability="snapshot",
    lanes=2,
    samples=80,
    batch_size=10,
    chunk_batches=1,
)


@contextmanager
def started(path: Path, shards: int) -> Iterator[Coordinator]:
    with closing(Coordinator(RUN, path=path, start_shards=shards)) as run:
        yield run


def owners(run: Coordinator) -> dict[str, int]:
    assert run.routing.routes is not None
    return {s.name: int(run.routing.routes.owned_by(s.number).sum()) for s in run.routing.shards()}


def complete(run: Coordinator, chunks: int) -> int:
    trainer = run.register("trainer", "trainer").member
    for _ in range(chunks):
        chunk = run.next_chunk(trainer)
        assert isinstance(chunk, Chunk)
        run.complete_chunk(trainer, chunk.lane, chunk.lease, chunk.index)
    return trainer


def test_a_new_run_has_the_shards_that_are_asked_for(tmp_path: Path) -> None:
    assert go_on(tmp_path / "state", ["a", "b"]) == GoingOn(shards=("a", "b"))
    with started(tmp_path / "state", 3) as run:  # cut off before all had come
        run.register("shard", "b", "local:0")
    assert go_on(tmp_path / "state", ["a"]).shards == ("a",)
    with started(tmp_path / "state", 1) as run:
        run.register("shard", "a", "local:1")
        assert owners(run) == {"b": 0, "a": 4096}


def test_fewer_shards_are_asked_for_than_hold_rows_and_then_more(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with started(path, 3) as run:
        for name in "abc":
            run.register("shard", name, f"local:{name}")
    found = go_on(path, ["a"])
    assert (found.shards, found.leaving, found.holding) == (("a", "b", "c"), ("b", "c"), ("a", "b", "c"))
    with started(path, 1) as run:
        assert [shard.state for shard in run.routing.shards()] == ["active", "draining", "draining"]
    assert go_on(path, ["a", "b", "d"]).shards == ("a", "b", "d", "c")
    with started(path, 1) as run:
        assert [shard.state for shard in run.routing.shards()] == ["active", "active", "draining"]
        run.register("shard", "d", "local:d")
        assert run.routing.receivers() == [0, 1, 3]


def test_a_run_that_was_cut_off_goes_back_to_its_last_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with started(path, 1) as run:
        run.register("shard", "a", "local:0")
        complete(run, 3)
        run.begin_snapshot("saved")
        run.end_snapshot("saved", finished=True)
        complete(run, 2)
    assert go_on(path, ["a"]).completed_chunks == 5
    found = go_on(path, ["a"], goes_back=True)
    assert (found.completed_chunks, found.snapshot, found.durability) == (3, "saved", "snapshot")


def test_a_journal_needs_no_way_back(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with closing(Coordinator(replace(RUN, durability="journal"), path=path)) as run:
        run.register("shard", "a", "local:0")
        run.begin_snapshot("saved")
        run.end_snapshot("saved", finished=True)
        complete(run, 2)
    found = go_on(path, ["a"], goes_back=True)
    assert (found.completed_chunks, found.snapshot) == (2, None)


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    with started(tmp_path / "state", 1), pytest.raises(ValueError, match="expected no other coordinator"):
        go_on(tmp_path / "state", ["a"])


def test_forgotten_shards_make_room_for_new_ones_under_later_routes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with started(path, 2) as run:
        for name in "ab":
            run.register("shard", name, f"local:{name}")
        before = run.routing.epoch
        with pytest.raises(
            ValueError, match="--forget-shards: expected all shards that hold buckets, got none named 'b'"
        ):
            run.forget_shards(["a"])
        assert owners(run) == {"a": 2048, "b": 2048}
    for _ in range(2):  # to say it again, when the coordinator was killed, changes nothing
        with started(path, 3) as run:
            run.forget_shards(["a", "b"])
            assert run.routes() is None or run.routing.epoch > before
            for name in "xyz":
                run.register("shard", name, f"local:{name}")
            assert {name: count for name, count in owners(run).items() if count} == {"x": 1366, "y": 1365, "z": 1365}
            assert run.routing.epoch == before + 1


def test_one_cannot_go_back_while_trainers_live(tmp_path: Path) -> None:
    from parameter_server.processes.coordinator_process import restore

    with closing(Coordinator(RUN, path=tmp_path / "state", lease_seconds=0.3)) as run:
        run.register("shard", "a", "local:0")
        run.begin_snapshot("saved")
        run.end_snapshot("saved", finished=True)
        trainer = complete(run, 2)
        with pytest.raises(RefusedError, match="expected no trainer, whose pushes would count as later ones, got 1"):
            restore(run, "saved", -2.0)
        with pytest.raises(RefusedError, match="expected the name of a finished snapshot, got 'other'"):
            restore(run, "other", 0.3)
        restore(run, "saved", 0.3)  # once it is missed
        assert run.status().samples_completed == 0
        assert not run.heartbeat(trainer).known
