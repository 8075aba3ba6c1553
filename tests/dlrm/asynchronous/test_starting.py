"""While a run starts, people see what it waits for, and it ends soon when it is asked to."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dlrm.asynchronous import crew as crew_module
from dlrm.asynchronous import joining, up
from dlrm.asynchronous.crew import Crew, Role
from dlrm.asynchronous.joining import describe_differences, join_run
from dlrm.asynchronous.stages import STAGE, Stage, describe_stage
from dlrm.asynchronous.train import run_trainer
from dlrm.cli import main
from embeddings.tables import TableConfig
from parameter_server.control.coordinator_client import LocalCoordinatorClient
from parameter_server.coordinator.answers import MemberStatus, Status
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.coordinator.going_on import go_on
from parameter_server.description import RunDescription

RUN = RunDescription(
    run_id=0,
    seed=1,
    tables=(TableConfig(name="site", num_rows=9, dim=4),),
    samples=100,
    epoch_samples=100,
    durability="journal",
    settings={"epochs": 1.0, "dense.learning_rate": 0.1, "data": "a"},
)


def status(samples: int, *members: tuple[str, Mapping[str, float]]) -> Status:
    plain = dict.fromkeys(("run_id", "route_epoch", "chunks", "chunks_completed", "chunks_out", "rows", "row_bytes"), 0)
    return Status(
        **plain,
        members=tuple(
            MemberStatus(
                member=number,
                role=cast(Any, role),
                name=role,
                address="",
                alive=True,
                seconds_since_heard=0.0,
                facts=dict(facts),
            )
            for number, (role, facts) in enumerate(members)
        ),
        samples=samples,
        samples_completed=0,
        lost_pushes=0,
        snapshots=(),
        snapshot_age_seconds=None,
        moves_done=0,
        moving_buckets=0,
        longest_freeze_seconds=0.0,
    )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (status(0), "starting trainers"),
        (status(9, ("trainer", {})), "starting shards, 0 of 2 ready"),
        (status(9, ("shard", {"rows": 0.0}), ("shard", {}), ("trainer", {})), "starting shards, 1 of 2 ready"),
        (status(9, *[("shard", {"rows": 0.0})] * 2, ("trainer", {STAGE: 0.0})), "starting trainers, first batch"),
        (status(9, ("trainer", {STAGE: 0.0}), ("trainer", {STAGE: float(Stage.TRAINING)})), "training"),
        (status(9, ("trainer", {STAGE: 1.0}), ("trainer", {STAGE: float(Stage.EVALUATING)})), "training"),
        (status(9, ("trainer", {STAGE: float(Stage.EVALUATING)})), "evaluating"),
        (status(9, ("trainer", {STAGE: float(Stage.SAVING)})), "saving"),
        (replace(status(9), samples_completed=9), "ending"),
    ],
)
def test_a_display_says_what_a_run_is_at(told: Status, words: str) -> None:
    assert describe_stage(told, 2) == words


def test_data_are_made_once_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("dlrm.data.provide.provide_dataset", lambda source, data: done.append(f"{source} {data}"))
    monkeypatch.setattr(up, "watch", lambda *_: done.append("watch"))
    monkeypatch.setattr(up, "choose_shards", lambda *_, **__: done.append("choose") or ("shard-0",))
    assert up.run_up(["synthetic", "--output", str(tmp_path / "run")]) == 0
    assert done == ["synthetic None", "choose", "watch"]


def test_who_is_waited_for_is_told_and_who_was_not_up_has_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "TELL_SECONDS", 0.1)
    said: list[str] = []
    slow = "import signal, time, sys; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.4), sys.exit(0)))"
    wait = "print('up', flush=True); time.sleep(60)"
    roles = [
        Role(name="slow", program=("-c", f"{slow}; {wait}"), order=0),
        Role(name="young", program=("-c", f"import time; {wait}"), order=0),
    ]
    with Crew(roles, tmp_path, max_restarts=0, say=said.append) as crew:
        while not all(member.log.read_text() for member in crew.members):
            time.sleep(0.02)
        crew.stop(30.0)
        assert [member.status() for member in crew.members] == [0, -signal.SIGTERM]
        assert list(crew.failures()) == []
    assert said == ["waiting for slow to end, 30 s more at most"]


def test_settings_that_differ_are_told_by_their_flags() -> None:
    given = replace(RUN, batch_size=8, samples=200, settings={**RUN.settings, "epochs": 2.0, "data": "b"})
    assert list(describe_differences(RUN, given)) == [
        "--servers.trainers (`up`: --trainers) or --global-batch-size: expected 1 samples per trainer and step, got 8",
        "--data: expected a, got b",
        "--epochs: expected 1.0, got 2.0",
    ]
    assert list(describe_differences(RUN, replace(RUN, samples=50))) == ["--epochs: expected 100, got 50"]


def test_a_trainer_of_another_run_says_which_flags_to_change() -> None:
    with closing(Coordinator(RUN)) as run:
        other = replace(RUN, settings={**RUN.settings, "dense.learning_rate": 0.2})
        with pytest.raises(ValueError, match=r"^expected .*: --dense\.learning-rate: expected 0\.1, got 0\.2; begin"):
            join_run(LocalCoordinatorClient(run), "trainer-0", other, "here")


def test_a_trainer_says_whom_it_waits_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "TELL_SECONDS", 0.05)

    def register(*_: object) -> None:
        time.sleep(0.3)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(joining, "Membership", register)
    with pytest.raises(ConnectionError, match="nobody there"):
        join_run(cast(Any, None), "trainer-0", RUN, "localhost:1")
    assert capsys.readouterr().err == "recforge: trainer-0: waiting for the coordinator at localhost:1\n"


def test_recipes_are_listed_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_trainer(["--help"]) == 0
    told = capsys.readouterr().out
    assert "criteo-kaggle" in told
    assert "`recforge ps trainer RECIPE --help`" in told


@pytest.mark.parametrize("registered", [(), ("shard-0",), ("shard-1",), ("shard-0", "shard-1")])
def test_an_interrupted_start_goes_on_with_fewer_shards(registered: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    with closing(Coordinator(path=path, start_shards=2)) as run:
        run.register("trainer", "trainer-0", "", RUN.to_json())
        for name in registered:
            run.register("shard", name, f"unix:before/{name}")
    found = go_on(path, ["shard-0"], goes_back=True)
    assert found.shards == (("shard-0", "shard-1") if len(registered) == 2 else ("shard-0",))
    with closing(Coordinator(path=path, start_shards=1)) as run:
        numbers = {name: run.register("shard", name, f"unix:now/{name}").shard for name in found.shards}
        trainer = run.register("trainer", "trainer-0", "", RUN.to_json())
        assert trainer.routes is not None
        holding = {number for number in numbers.values() if trainer.routes.owned_by(number).any()}
        assert {trainer.routes.addresses[number] for number in holding} <= {f"unix:now/{name}" for name in numbers}
        assert all(trainer.routes.addresses[number].startswith("unix:now/") for number in holding)


def test_a_remark_on_an_interrupt_follows_without_a_blank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt("; the same command continues")

    monkeypatch.setattr("dlrm.asynchronous.command.run_ps", interrupt)
    assert main(["ps"]) == 130
    assert capsys.readouterr().err == "recforge: error: interrupted; the same command continues\n"
