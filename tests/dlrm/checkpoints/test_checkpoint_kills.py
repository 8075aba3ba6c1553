"""A process that dies while it saves, at any moment, leaves a whole checkpoint: the old one or the new one."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dlrm.checkpoints.checkpoint import CheckpointStore

# One process imports torch and forks a writer for each line it is told. "after 0.1": save until killed 0.1 s later.
# "at 7": die before the seventh operation on the checkpoints' folder.
WRITERS = textwrap.dedent(
    """
    import os, signal, sys, time, torch
    from dlrm.checkpoints.checkpoint import CheckpointStore

    def write(folder, pipe, saves):
        store = CheckpointStore(folder, keep_last=2)
        restored = store.restore_latest()
        samples = restored.info.samples if restored else 0
        for _ in range(saves):
            samples += 1
            value = float(samples)
            state = {"tables": {"a.weight": torch.full((30_000, 4), value)}, "dense": torch.full((9,), value)}
            store.save(state | {"progress": {"samples": samples}}, samples=samples, is_best=samples % 5 == 0)
            store.wait()
            os.write(pipe, b"%d\\n" % samples)

    def die_at(operation, folder):
        left = [operation]
        def count(event, arguments):
            if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(folder) for a in arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)

    torch.set_num_threads(1)
    for line in sys.stdin:
        when, number = line.split()
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            if when == "at":
                die_at(int(number), sys.argv[1])
            write(sys.argv[1], writes, 10**9 if when == "after" else 1)
            os._exit(0)
        os.close(writes)
        if when == "after":
            time.sleep(float(number))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reads) as said:
            print(os.WIFSIGNALED(status), max((int(number) for number in said), default=0), flush=True)
    """
)


class Writers:
    """Kills writers, and checks after each kill that a whole checkpoint is found."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        self.reached = self.inside_a_write = 0

    def kill(self, when: str) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(when, file=self.process.stdin, flush=True)
        killed, said = self.process.stdout.readline().split()
        self.inside_a_write += bool(list(self.folder.glob(".*")))
        restored = CheckpointStore(self.folder, keep_last=2).restore_latest()
        if restored is None:
            assert self.reached == int(said) == 0
            return killed == "True"
        assert restored.skipped == ()
        # What was said to be on disk is there; of the one after it, all or nothing.
        assert restored.info.samples - max(int(said), self.reached) in (0, 1)
        self.reached = restored.info.samples
        assert restored.state["progress"]["samples"] == self.reached
        assert restored.state["tables"]["a.weight"].unique().tolist() == [self.reached]
        assert restored.state["dense"].unique().tolist() == [self.reached]
        assert list(self.folder.glob(".*")) == []
        return killed == "True"


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    command = [sys.executable, "-c", WRITERS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Writers(tmp_path, process)


def test_killed_at_any_moment_a_whole_checkpoint_is_found(writers: Writers) -> None:
    dice = random.Random(11)
    kills = 0
    while kills < 12 or writers.inside_a_write < 3 or writers.reached < 3:
        assert kills < 200, f"{writers.inside_a_write} kills fell into a write; {writers.reached} checkpoints were made"
        assert writers.kill(f"after {dice.uniform(0.0, 0.25)}")
        kills += 1


def test_killed_before_any_operation_a_whole_checkpoint_is_found(writers: Writers, tmp_path_factory: Any) -> None:
    start = tmp_path_factory.mktemp("start") / "checkpoints"
    while writers.reached < 4:
        assert not writers.kill("at 0")
    shutil.copytree(writers.folder, start)
    operation = 0
    killed = True
    while killed:
        operation += 1
        shutil.rmtree(writers.folder)
        shutil.copytree(start, writers.folder)
        writers.reached = 4
        killed = writers.kill(f"at {operation}")
    assert operation > 30
    assert writers.inside_a_write > 12
    assert [info.samples for info in CheckpointStore(writers.folder).list()] == [5, 4]
