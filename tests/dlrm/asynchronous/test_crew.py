"""Processes of a crew are started again, stopped in order, and never left behind, however their launcher ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm.asynchronous.crew import Crew, Role, describe_end

WAIT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print('up', flush=True)
time.sleep(60)
"""
STUBBORN = WAIT.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")


def role(name: str, code: str, order: int = 0, *, works: bool = False) -> Role:
    return Role(name=name, program=("-c", code), order=order, ends_by_itself=works)


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.01)


def until_up(folder: Path, name: str) -> None:
    until(lambda: "up\n" in (folder / f"{name}.log").read_text())


def run_to_end(crew: Crew) -> None:
    until(crew.look)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_the_work_is_done_when_all_workers_are(tmp_path: Path) -> None:
    roles = [role("server", WAIT, 1), role("a", "print('one')", works=True), role("b", "", works=True)]
    with Crew(roles, tmp_path, max_restarts=0, say=print) as crew:
        run_to_end(crew)
        server = crew.members[0].pid
        assert server is not None
        until_up(tmp_path, "server")
        crew.stop()
        assert crew.members[0].status() == 0
        assert list(crew.failures()) == []
    assert not is_running(server)
    assert (tmp_path / "a.log").read_text() == "one\n"


def test_one_that_is_lost_is_started_again_and_named(tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal, sys
tries = pathlib.Path({str(tmp_path / "tries")!r})
n = int(tries.read_text()) if tries.exists() else 0
tries.write_text(str(n + 1))
if n == 0: os.kill(os.getpid(), signal.SIGKILL)
if n == 1: print("recforge: error: the sky\\nhas fallen", file=sys.stderr); sys.exit(1)
"""
    said: list[str] = []
    with Crew([role("trainer-0", code, works=True)], tmp_path / "logs", max_restarts=2, say=said.append) as crew:
        run_to_end(crew)
    assert said == [
        "trainer-0 was killed by SIGKILL; it is started again (restart 1 of 2)",
        "trainer-0 has ended with status 1: the sky; it is started again (restart 2 of 2)",
    ]


@pytest.mark.parametrize(
    ("code", "restarts", "message", "starts"),
    [
        (
            "print('recforge: error: --lanes: no'); raise SystemExit(2)",
            3,
            r"^shard-0 has ended with status 2: --lanes: no$",
            1,
        ),
        ("raise SystemExit(1)", 1, r"^shard-0 has ended with status 1; no restart is left \(--max-restarts 1\)$", 2),
        ("raise KeyError('rows')", 0, r"^shard-0 has ended with status 1: KeyError: 'rows'; no restart", 1),
    ],
)
def test_what_cannot_go_on_ends_all(tmp_path: Path, code: str, restarts: int, message: str, starts: int) -> None:
    said: list[str] = []
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write('x');"
    roles = [role("other", WAIT, 1, works=True), role("shard-0", count + code)]
    crew = Crew(roles, tmp_path, max_restarts=restarts, say=said.append)
    pids: list[int] = []

    def work() -> None:
        with crew:
            until_up(tmp_path, "other")
            pids.append(crew.members[0].pid or 0)
            run_to_end(crew)

    with pytest.raises(ValueError, match=message):
        work()
    (other,) = pids
    assert other
    assert not is_running(other)
    assert len((tmp_path / "starts").read_text()) == starts
    assert crew.members[0].status() == 0  # it was asked to end, and could save what it held


def test_members_stop_in_order_and_stubborn_ones_are_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    tells = WAIT.replace("sys.exit(0)", "(open({!r}, 'a').write({!r}), sys.exit(0))")
    said: list[str] = []
    roles = [role(name, tells.format(str(told), name), order) for name, order in (("c", 2), ("s", 1), ("t", 0))]
    with Crew([*roles, role("x", STUBBORN, 1)], tmp_path, max_restarts=0, say=said.append) as crew:
        for name in "cstx":
            until_up(tmp_path, name)
        crew.stop(0.5)
        assert list(crew.failures()) == ["x was killed by SIGKILL: up"]
    assert told.read_text() == "tsc"
    assert said == ["x has not ended within 0.5 s of being asked, and is killed"]


def test_no_orphan_is_left_when_the_launcher_is_killed(tmp_path: Path) -> None:
    member = "from dlrm.distributed.place import stop_with_launcher; stop_with_launcher()" + WAIT
    launcher = f"""
import time
from pathlib import Path
from dlrm.asynchronous.crew import Crew, Role
roles = [Role(name="m", program=("-c", {member!r}), order=0)]
with Crew(roles, Path({str(tmp_path)!r}), max_restarts=0, say=print) as crew:
    print(crew.members[0].pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        until_up(tmp_path, "m")
        process.kill()
    until(lambda: not is_running(pid))


def test_one_whose_launcher_has_gone_before_it_began_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlrm.distributed.place import stop_with_launcher

    monkeypatch.setenv("RECFORGE_LAUNCHER", str(os.getppid() + 1))
    with pytest.raises(ValueError, match="it has ended"):
        stop_with_launcher()
    assert "RECFORGE_LAUNCHER" not in os.environ


def test_ends_are_told_in_words() -> None:
    assert describe_end(3) == "has ended with status 3"
    assert describe_end(-signal.SIGSEGV) == "was killed by SIGSEGV"
    assert describe_end(-99) == "was killed by signal 99"
