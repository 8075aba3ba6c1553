"""`recforge ps up` starts what it says, shows one display for all, and ends as its members do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from dlrm.asynchronous.crew import Role
from dlrm.asynchronous.crew_progress import CrewProgress
from dlrm.asynchronous.train import run_trainer
from dlrm.asynchronous.up import UpConfig, choose_shards, plan_roles, read_flags, run_up, watch
from embeddings.tables import TableConfig
from parameter_server.address import Address
from parameter_server.coordinator.answers import Chunk, MemberStatus, Status
from parameter_server.coordinator.coordinator import Coordinator
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost
from parameter_server.processes.coordinator_process import STATE

SERVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print('up', flush=True)
time.sleep(60)
"""
TRAINER = SERVER.replace("sys.exit(0)", "sys.exit(130)")


def role(name: str, code: str, *, works: bool = False) -> Role:
    return Role(name=name, program=("-c", code), order=0 if works else 1, ends_by_itself=works)


def test_flags_of_members_are_passed_on() -> None:
    config, rest = read_flags(["--shards", "3", "--epochs", "2", "--trainers=1", "--servers.staleness", "0"])
    assert (config.shards, config.trainers, rest) == (3, 1, ["--epochs", "2", "--servers.staleness", "0"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shards", "0"], "--shards: expected at least 1, got 0"),
        (["--trainers", "two"], "--trainers: invalid int value: 'two'"),
        (["--max-restarts", "-1"], "--max-restarts: expected at least 0"),
        (["--servers.coordinator", "localhost:1"], "--servers.coordinator: expected none, as all members are started"),
        (["--servers.name=me"], "--servers.name: expected none"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--servers.lanes", "0"], "--servers.lanes: expected at least 1, got 0"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_started(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_up(["synthetic", *flags])


@pytest.mark.parametrize("start", [run_up, run_trainer])
def test_a_run_without_servers_is_not_written_over(tmp_path: Path, start: Callable[[list[str]], int]) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=f"--output {tmp_path}: .* with --branch-from {tmp_path}$"):
        start(["synthetic", "--output", str(tmp_path)])


def test_members_know_one_another(tmp_path: Path) -> None:
    sockets = Path("/tmp/recforge-12345678")
    roles = plan_roles(
        UpConfig(shards=2, trainers=2, metrics_port=9000), ["synthetic"], tmp_path, sockets, durability="journal"
    )
    assert [role.name for role in roles] == ["coordinator", "shard-0", "shard-1", "trainer-0", "trainer-1"]
    assert [role.order for role in roles] == [2, 1, 1, 0, 0]
    assert [role.ends_by_itself for role in roles] == [False, False, False, True, True]
    flags = [dict(zip(role.program[4:], role.program[5:], strict=False)) for role in roles]
    address = flags[0]["--address"]
    assert {given.get("--coordinator", given.get("--servers.coordinator")) for given in flags[1:]} == {address}
    own = [Address.parse(given["--address"]) for given in flags[:3]]
    assert len({place.path for place in own}) == 3
    assert [given["--metrics-port"] for given in flags[:3]] == ["9000", "9001", "9002"]
    assert flags[1]["--folder"] != flags[2]["--folder"]
    assert {given["--output"] for given in flags[3:]} == {str(tmp_path)}
    forgetful = plan_roles(UpConfig(), ["synthetic"], tmp_path, sockets, durability="none")
    assert "--folder" not in forgetful[1].program


def test_it_is_over_when_the_trainers_are(tmp_path: Path) -> None:
    roles = [role("shard-0", SERVER), role("trainer-0", "import time; time.sleep(0.3)", works=True)]
    watch(roles, UpConfig(), tmp_path, tmp_path)
    assert (tmp_path / "members" / "ended").is_file()
    assert (tmp_path / "members" / "shard-0.log").read_text() == "up\n"


def test_a_trainer_that_cannot_go_on_is_told_of_with_its_last_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('recforge: error: rows went astray', file=sys.stderr); sys.exit(1)"
    with pytest.raises(ValueError, match=r"trainer-0 has ended with status 1: rows went astray; no restart is left"):
        watch([role("trainer-0", code, works=True)], UpConfig(max_restarts=1), tmp_path, tmp_path)
    line = "recforge: trainer-0 has ended with status 1: rows went astray; it is started again (restart 1 of 1)"
    assert line in capfd.readouterr().err


def test_ctrl_c_ends_all_in_good_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    roles = [role("shard-0", SERVER), role("trainer-0", TRAINER, works=True)]

    def press() -> None:
        while not all(
            (tmp_path / "members" / f"{each.name}.log").exists()
            and (tmp_path / "members" / f"{each.name}.log").read_text()
            for each in roles
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt, match=f"the same command with --output {tmp_path} continues"):
        watch(roles, UpConfig(), tmp_path, tmp_path)
    presser.join()
    assert "are asked to save what they hold" in capfd.readouterr().err


def begun(output: Path, durability: str, shards: int = 2, chunks: int = 1) -> None:
    """Leaves the state of a run behind that was cut off after a chunk, or in the first one."""
    description = RunDescription(
        run_id=1,
        seed=0,
        tables=(TableConfig(name="t", num_rows=10, dim=2),),
        durability=cast(Any, durability),
        samples=100,
        batch_size=10,
    )
    with closing(Coordinator(description, path=output / "coordinator" / STATE, start_shards=shards)) as run:
        for number in range(shards):
            run.register("shard", f"shard-{number}", f"local:{number}")
            if durability != "none":
                (output / "shards" / f"shard-{number}").mkdir(parents=True)
        run.begin_snapshot("saved")
        run.end_snapshot("saved", finished=True)
        trainer = run.register("trainer", "trainer-0").member
        chunk = run.next_chunk(trainer)
        assert isinstance(chunk, Chunk)
        if chunks:
            run.complete_chunk(trainer, chunk.lane, chunk.lease, chunk.index)


def test_a_run_goes_on_with_as_many_shards_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_shards(UpConfig(shards=2), tmp_path) == ("shard-0", "shard-1")
    begun(tmp_path, "journal")
    assert choose_shards(UpConfig(shards=3), tmp_path) == ("shard-0", "shard-1", "shard-2")
    assert capsys.readouterr().err == ""
    assert choose_shards(UpConfig(shards=1), tmp_path) == ("shard-0", "shard-1")
    assert capsys.readouterr().err == "recforge: the rows of shard-1 move to the other shards; its folder may go then\n"
    (tmp_path / "shards" / "shard-1").rmdir()
    with pytest.raises(ValueError, match=r"expected the rows of shard-1 in shards/shard-1, got no such folder"):
        choose_shards(UpConfig(shards=3), tmp_path)


def test_a_run_whose_rows_were_not_kept_says_so(tmp_path: Path) -> None:
    begun(tmp_path, "none")
    with pytest.raises(
        ValueError, match=r"got one whose rows were not kept \(--servers.durability none\); begin another"
    ):
        choose_shards(UpConfig(), tmp_path)


def test_a_run_that_branches_off_does_not_begin_again_without_the_rows_that_were_loaded(tmp_path: Path) -> None:
    begun(tmp_path, "none", chunks=0)
    assert choose_shards(UpConfig(), tmp_path) == ("shard-0", "shard-1")
    with pytest.raises(ValueError, match="got one whose rows were not kept"):
        choose_shards(UpConfig(), tmp_path, branches=True)


def test_a_run_that_was_cut_off_goes_back_and_one_that_has_ended_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path, "snapshot")
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "ended").touch()
    choose_shards(UpConfig(), tmp_path)
    assert capsys.readouterr().err == ""
    choose_shards(UpConfig(), tmp_path)  # nobody has said since that all is well
    assert capsys.readouterr().err == "recforge: goes on from snapshot saved, as the run was cut off\n"


class FakeCoordinator:
    """Answers with one status after the other."""

    def __init__(self, answers: Sequence[Status | None]) -> None:
        self._answers = iter(answers)

    def status(self) -> Status:
        answer = next(self._answers)
        if answer is None:
            raise ConnectionLost("away")
        return answer

    def close(self) -> None:
        pass


def status(samples: int, pulled: float, loss: float) -> Status:
    def member(role: Any, **facts: float) -> MemberStatus:
        return MemberStatus(
            member=1, role=role, name=role, address="", alive=True, seconds_since_heard=0.0, facts=facts
        )

    plain = dict.fromkeys(("run_id", "route_epoch", "chunks", "chunks_completed", "chunks_out", "rows", "row_bytes"), 0)
    return Status(
        **plain,
        members=(
            member("shard", pulled_rows=pulled, pushed_rows=0.0),
            member("trainer", loss=loss),
            member("trainer", loss=loss + 0.2),
        ),
        samples=1000,
        samples_completed=samples,
        lost_pushes=3,
        snapshots=(),
        snapshot_age_seconds=None,
        moves_done=0,
        moving_buckets=0,
        longest_freeze_seconds=0.0,
    )


def test_one_display_shows_what_all_members_do(capfd: pytest.CaptureFixture[str]) -> None:
    fake = FakeCoordinator([None, status(200, 1e3, 0.5), status(700, 1e6, 0.4)])
    with CrewProgress("unix:c", lambda _: cast(Any, fake)) as progress:
        for _ in range(3):
            progress.show(at_once=True)
        progress.show()  # no sooner than makes sense
    shown = capfd.readouterr().err
    assert "700/1.00k" in shown
    assert "loss=0.5000" in shown
    assert "rows/s" in shown
    assert "3 pushes lost" in shown


def test_help_needs_neither_torch_nor_grpc() -> None:
    check = (
        "import sys; from deploy.cli import main;"
        "status = main(['ps', '--help']) + main(['ps', 'up', '--help']);"
        "print(status, [name for name in ('torch', 'grpc', 'numba', 'cryptography') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("0 []\n")
    for part in ("coordinator", "shard", "trainer", "up", "status", "drain", "snapshot", "certificates"):
        assert f"\n  {part} " in shown
