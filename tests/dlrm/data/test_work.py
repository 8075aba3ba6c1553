"""Workers take tasks no faster than they finish them, and end when their parent does or say so when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlrm.data.work import WorkerDied, Workers, remove_scratch, whole_file, whole_folder


def double(task: int) -> int:
    return 2 * task


def refuse(task: int) -> int:
    raise ValueError(f"task {task}\nis wrong")


def kill_self(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_are_taken_as_they_are_worked_on(processes: int) -> None:
    """Each may be a piece of a log that was decompressed for it."""
    taken = 0

    def draw() -> Iterator[int]:
        nonlocal taken
        while taken < 40:
            taken += 1
            yield taken

    done = []
    with Workers(processes, lambda *_: None) as workers:
        for task, result in workers.run(double, draw()):
            assert result == 2 * task
            done.append(task)
            assert taken - len(done) <= 2 * processes + 1
    assert sorted(done) == list(range(1, 41))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_is_the_callers(processes: int) -> None:
    with Workers(processes, lambda *_: None) as workers, pytest.raises(ValueError, match=r"task \d"):
        list(workers.run(refuse, [1, 2, 3]))


def test_a_killed_worker_is_named() -> None:
    """As the kernel does when memory runs out."""
    with Workers(2, lambda *_: None) as workers, pytest.raises(WorkerDied, match="a worker process was killed"):
        list(workers.run(kill_self, [1, 2, 3]))


def test_workers_do_without_torch() -> None:
    """Each would load 200 MB of it."""
    code = "import sys, dlrm.data.prepare, dlrm.data.commands, dlrm.data.infer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_outputs_are_whole_or_absent(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        with whole_folder(folder / "a") as scratch:
            (scratch / "x").write_text("1")
            assert not (folder / "a").exists()
        with whole_file(folder / "b") as scratch:
            scratch.write_text("2")
            assert not (folder / "b").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert (tmp_path / "a" / "x").read_text() == "1"
    assert not (tmp_path / "b").exists()
    assert len(list(tmp_path.iterdir())) == 2
    remove_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


INTERRUPTED_EARLY = """
import os, signal, sys, threading
from dlrm.data.work import Workers

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    with Workers(2, lambda *_: None) as workers:
        threading.Timer(float(sys.argv[1]), os.killpg, (os.getpgid(0), signal.SIGINT)).start()
        for _ in workers.run(abs, range(10**9)):
            pass
"""


@pytest.mark.parametrize("delay_seconds", [0.03, 0.1, 0.3])
def test_interrupted_while_workers_start(delay_seconds: float, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group; workers that still import must not print tracebacks of their own."""
    (tmp_path / "main.py").write_text(INTERRUPTED_EARLY)
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py", str(delay_seconds)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == -signal.SIGINT
    assert result.stderr.count("Traceback") == 1, result.stderr
    assert result.stderr.endswith("KeyboardInterrupt\n")
