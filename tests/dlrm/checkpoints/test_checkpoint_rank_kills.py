"""Two ranks of which one dies while they save, at whatever moment, leave a whole checkpoint: the old or the new one."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlrm.checkpoints.checkpoint import CheckpointStore

# One process imports torch, and forks two ranks for each line it is told. "1 7": rank 1 dies before its seventh
# operation on the checkpoints' folder; "2 0.1": both die 0.1 s after they began to save. It answers with whether one
# died, and how many samples a rank has called saved.
RANKS = textwrap.dedent(
    """
    import os, signal, sys, time
    from datetime import timedelta
    from pathlib import Path
    import torch, torch.distributed as dist
    from dlrm.checkpoints.checkpoint import CheckpointStore
    from dlrm.checkpoints.pieces import PartedTensor, Parts, piece_of
    from dlrm.distributed.ranks import Ranks

    folder, meeting = sys.argv[1:]
    ROWS = 15_000  # of each rank

    def take_state(rank, samples):
        value = float(samples)
        piece = piece_of(torch.full((ROWS, 4), value), (ROWS * rank, 0))
        return {
            "tables": Parts({"a.weight": PartedTensor(shape=(2 * ROWS, 4), dtype=torch.float32, pieces=(piece,))}),
            "dense": torch.full((9,), value),
            "random": {"torch": torch.full((2,), value + rank)},
            "progress": {"samples": samples},
        }

    def die_at(operation):
        left = [operation]
        def count(event, arguments):
            if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(folder) for a in arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)

    def save(rank, number, operation, pipe):
        store = dist.FileStore(f"{meeting}/{number}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        checkpoints = CheckpointStore(folder, keep_last=2, ranks=Ranks(rank=rank, count=2))
        restored = checkpoints.restore_latest()
        samples = restored.info.samples + 1 if restored else 1
        if restored:
            assert restored.state["random"]["torch"].tolist() == [samples - 1 + rank] * 2
        dist.barrier()
        os.write(pipe, b"begun\\n")
        die_at(operation)
        checkpoints.save(take_state(rank, samples), samples=samples, is_best=samples % 5 == 0)
        checkpoints.wait()
        os.write(pipe, b"%d\\n" % samples)
        dist.barrier()

    def start(rank, number, operation, pipe):
        child = os.fork()
        if not child:
            status = 1
            try:
                save(rank, number, operation, pipe)
                status = 0
            finally:
                os._exit(status)
        return child

    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        victim, when = line.split()
        reads, writes = os.pipe()
        ranks = [start(rank, number, int(when) if rank == int(victim) else 0, writes) for rank in range(2)]
        os.close(writes)
        said = os.fdopen(reads, "rb", buffering=0)
        if victim == "2":
            said.readline(), said.readline()  # both have begun
            time.sleep(float(when))
            died = True
        else:
            died = os.WIFSIGNALED(os.waitpid(ranks.pop(int(victim)), 0)[1])
            if died:
                time.sleep(0.02)  # the other goes on for a while, and is then ended by who has started it
        if died:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        ends = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        assert died or ends == [0], ends
        print(died, max((int(line) for line in said if line != b"begun\\n"), default=0), flush=True)
    """
)


class TwoRanks:
    """Kills ranks, and checks after each kill that a whole checkpoint is found."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        self.reached = self.kills = self.inside_a_write = 0

    def kill(self, when: str) -> bool:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(when, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().split()
        assert len(answer) == 2, "the process that starts the ranks has died"
        died, said = answer[0] == "True", int(answer[1])
        self.kills += died
        self.inside_a_write += bool(list(self.folder.glob(".*")))
        restored = CheckpointStore(self.folder, keep_last=2).restore_latest()
        if restored is None:
            assert self.reached == said == 0
            return died
        assert restored.skipped == ()
        # What a rank has called saved is there; of the one after it, all or nothing.
        assert restored.info.samples - max(said, self.reached) in (0, 1)
        self.reached = restored.info.samples
        assert restored.state["progress"]["samples"] == self.reached
        rows = restored.state["tables"]["a.weight"].read()
        assert rows.shape == (30_000, 4)
        assert rows.unique().tolist() == [self.reached]
        assert restored.state["dense"].unique().tolist() == [self.reached]
        assert list(self.folder.glob(".*")) == []
        return died

    def kill_at_every(self, rank: int, stride: int) -> None:
        """Kill a rank before its operations 1, 1 + stride, ..., until a save has no more of them."""
        operation = 1
        while self.kill(f"{rank} {operation}"):
            operation += stride
        assert operation > 10


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[TwoRanks]:
    (tmp_path / "meeting").mkdir()
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-c", RANKS, str(folder), str(tmp_path / "meeting")]
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        yield TwoRanks(folder, process)


def test_a_rank_killed_while_both_save_leaves_a_whole_checkpoint(ranks: TwoRanks) -> None:
    for rank in range(2):
        ranks.kill_at_every(rank, stride=5)
    assert ranks.reached >= 2  # after the last operation nothing was there to be killed
    assert ranks.inside_a_write >= 5


@pytest.mark.long
def test_ranks_killed_at_every_operation_or_moment_leave_a_whole_checkpoint(ranks: TwoRanks) -> None:
    for rank in range(2):
        ranks.kill_at_every(rank, stride=1)
    dice, before = random.Random(5), ranks.inside_a_write
    for _ in range(100):
        assert ranks.kill(f"2 {dice.uniform(0.0, 0.1)}")
    assert ranks.inside_a_write > before + 5
    assert ranks.reached > 5
