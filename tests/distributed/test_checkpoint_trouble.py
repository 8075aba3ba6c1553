"""What befalls one rank that saves or restores befalls all, and each says it in one line that names the rank."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dlrm.checkpoints import checkpoint, shared_saves
from dlrm.checkpoints.checkpoint import CheckpointStore
from dlrm.checkpoints.run_state import take_model
from dlrm.distributed.ranks import Ranks
from embeddings import RowAdagrad, ShardingPlan, TableConfig
from embeddings.build import build_tables
from embeddings.shards import place

pytestmark = pytest.mark.timeout(600)
CONFIG = TableConfig(name="adagrad", num_rows=50, dim=6, optimizer=RowAdagrad(learning_rate=0.1))


class Model(nn.Module):
    """A table of which each rank has a half, and a dense weight."""

    def __init__(self, count):
        super().__init__()
        table = place(CONFIG, "row_wise", list(range(count)), ranks_per_node=1)
        self.tables = build_tables([CONFIG], seed=1, plan=ShardingPlan(ranks=count, ranks_per_node=1, tables=(table,)))
        torch.manual_seed(1)
        self.dense = nn.Linear(3, 2)


class Witness:
    """One of the ranks, and what it says of each trouble."""

    def __init__(self, rank, count, folder):
        self.rank, self.ranks, self.folder, self.said = rank, Ranks(rank=rank, count=count), Path(folder), {}
        self.model = Model(count)

    def hear(self, name, call):
        try:
            self.said[name] = call()
        except ValueError as error:
            self.said[name] = str(error)
        dist.barrier()

    def save(self, store, samples):
        store.save({**take_model(self.model), "progress": {"at": samples}}, samples=samples)
        store.wait()


def meet_trouble(rank, count, folder):
    """Let one rank after the other be in trouble, and tell what each says."""
    witness = Witness(rank, count, folder)
    store = fail_to_save(witness)
    fail_to_restore(witness, store)
    return witness.said


def fail_to_save(witness):
    rank, ranks, folder, hear = witness.rank, witness.ranks, witness.folder, witness.hear
    shared_saves.SIGHT_SECONDS = 0.2
    hear("not shared", lambda: CheckpointStore(folder / f"own-{rank}", ranks=ranks))
    hear("no folder", lambda: CheckpointStore(folder / "file" / "in the way", ranks=ranks))

    store = CheckpointStore(folder / "c", ranks=ranks, timeout_seconds=1.0)
    witness.save(store, 1)
    free, write = checkpoint.shutil.disk_usage, checkpoint.write_rank_files
    for name, victim in (("disk full on 0", 0), ("disk full on 1", 1), ("disk full meanwhile", 0)):
        if rank == victim:
            checkpoint.shutil.disk_usage = lambda path: SimpleNamespace(free=10)
        elif name == "disk full meanwhile":
            checkpoint.write_rank_files = lambda *args, **more: wait_until_gone(args[0]) or write(*args, **more)
        hear(name, lambda: witness.save(store, 2))
        checkpoint.shutil.disk_usage, checkpoint.write_rank_files = free, write
    (rows,) = witness.model.tables.rows()
    if rank == 1:
        rows.weight[3, 1] = float("nan")
    hear("not finite", lambda: witness.save(store, 3))
    if rank == 1:
        rows.weight[3, 1] = 0.0
    hear("absent", lambda: witness.save(store, 4) if rank == 0 else None)
    leftovers = sorted(path.name.split(".")[-1] for path in (folder / "c").glob(".*"))
    dist.barrier()
    store = CheckpointStore(folder / "c", ranks=ranks)
    dist.barrier()
    witness.said["leftovers"] = leftovers, len(list((folder / "c").glob(".*")))
    dist.barrier()  # or the other would see what is written next
    witness.save(store, 5)
    witness.said["kept"] = [info.samples for info in store.list()]
    return store


def fail_to_restore(witness, store):
    rank, folder = witness.rank, witness.folder
    dist.barrier()
    if rank == 0:
        victim = folder / "c" / "samples-000000000005" / "rank-00001.tables.safetensors"
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    dist.barrier()
    restored = store.restore_latest()
    witness.said["damaged"] = restored.info.samples, restored.skipped
    dist.barrier()
    if rank == 0:
        (folder / "c" / "samples-000000000001" / "manifest.json").unlink()
    dist.barrier()
    witness.hear("all damaged", store.restore_latest)
    witness.hear("no best", store.restore_best)


def wait_until_gone(path):
    end = time.monotonic() + 60
    while path.exists() and time.monotonic() < end:
        time.sleep(0.002)


def test_trouble_of_one_rank_is_one_line_on_all(run_ranks, tmp_path):
    (tmp_path / "file").touch()
    zero, one = run_ranks(meet_trouble, 2, str(tmp_path), seconds=300)
    for name, told in zero.items():
        if not name.startswith("disk full") and name not in ("not finite", "absent"):
            assert one[name] == told, name
    assert (
        f"does not see the checkpoints that rank 0 keeps in {tmp_path}/own-0, got {tmp_path}/own-1"
        in zero["not shared"]
    )
    assert zero["not shared"].startswith("rank 1 on ")
    assert "--output" in zero["not shared"]
    assert "file/in the way" in zero["no folder"]
    for victim, (own, other) in enumerate([(zero, one), (one, zero)]):
        name = f"disk full on {victim}"
        assert own[name].startswith("the checkpoint after 2 samples was not written (the disk is full): expected")
        assert other[name] == f"rank {victim}: {own[name]}"
    assert one["disk full meanwhile"] == f"rank 0: {zero['disk full meanwhile']}"
    assert "tables/adagrad.weight, got nan in row 28;" in one["not finite"]  # row 3 of the second half
    assert zero["not finite"] == f"rank 1: {one['not finite']}"
    assert "(waited 1 s for rank 1, which has not written its part)" in zero["absent"]
    assert one["absent"] is None
    assert zero["leftovers"] == (["failed"] * 5, 0)
    assert zero["kept"] == [5, 1]
    samples, (line,) = zero["damaged"]
    assert samples == 1
    assert "samples-000000000005: rank-00001.tables.safetensors is damaged (checksum)" in line
    assert "using an earlier checkpoint, after 1 samples" in line
    assert "expected an intact checkpoint" in zero["all damaged"]
