"""Memory that ranks share: all have it or none, whatever one of them lacks, and it goes with the last one of them."""

from __future__ import annotations

import os
import pickle
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowSGD, ShardingPlan, TableConfig
from embeddings.sharded.lanes import lay_lanes
from embeddings.sharded.node_memory import share_memory
from embeddings.sharded.sharded_tables import ShardedTables
from embeddings.shards import place

CONFIG = TableConfig(name="a", num_rows=1000, dim=16, optimizer=RowSGD(learning_rate=0.1))
KEPT = re.compile(r" (\d+) +/memfd:recforge")  # a line of /proc/PID/maps: the file's inode and name


def plan_of(count: int, *, nodes: bool = False) -> ShardingPlan:
    per_node = 1 if nodes else count
    return ShardingPlan(ranks=count, ranks_per_node=per_node, tables=(place(CONFIG, "row_wise", range(count)),))


def fail(*_: Any) -> int:
    raise PermissionError(1, "Operation not permitted")


def try_without(rank: int, count: int) -> dict[str, Any]:
    """Shares memory where nothing is missing, and where something is on one rank; says who had it, and what is left."""
    lanes, files = lay_lanes([CONFIG], plan_of(count)), len(os.listdir("/proc/self/fd"))
    found: dict[str, Any] = {}
    breaks: dict[str, tuple[int, str, Any]] = {
        "as it is": (-1, "", None),
        "none to be had": (0, "memfd_create", fail),
        "too large": (0, "ftruncate", fail),
        "not to be opened": (1, "open", fail),
        "another file at that place": (1, "pread", lambda file, size, at: b"?" * size),
    }
    for name, (on, function, broken) in breaks.items():
        with pytest.MonkeyPatch.context() as patch:
            if rank == on:
                patch.setattr(os, function, broken)
            found[name] = share_memory(lanes, rank) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "memfd_create")
        found["another system"] = share_memory(lanes, rank) is not None
        found["over the network"] = exchange_of(ShardedTables([CONFIG], plan=plan_of(count)))
    found["on one machine"] = exchange_of(ShardedTables([CONFIG], plan=plan_of(count)))
    found["on machines"] = exchange_of(ShardedTables([CONFIG], plan=plan_of(count, nodes=True)))
    found["sixteen bits"] = exchange_of(ShardedTables([CONFIG], plan=plan_of(count), exchange="bf16"))
    found["mapped"] = KEPT.findall(Path("/proc/self/maps").read_text())
    found["files"] = len(os.listdir("/proc/self/fd")) - files
    return found


def exchange_of(tables: ShardedTables) -> str:
    return type(tables._rows._vectors).__name__


def train_for_ever(rank: int, count: int, folder: Path) -> None:
    """Leaves what it found in the folder, and then trains over shared memory until it is killed."""
    found = try_without(rank, count)
    tables = ShardedTables([CONFIG], plan=plan_of(count))
    batch = KeyedJaggedTensor(keys=["a"], values=torch.arange(1000), lengths=torch.ones(1000, dtype=torch.int64))
    step = 0
    while True:
        tables(batch).values().square().sum().backward()
        step += 1
        if step == 3:
            dist.barrier()
            (folder / f"{rank}.part").write_bytes(pickle.dumps(found))
            (folder / f"{rank}.part").rename(folder / f"{rank}")


def maps_of(pid: int | str) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended, or is another user's
        return ""


@pytest.fixture(scope="module")
def killed(start_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ranks found, what they had mapped, and how they ended once one was killed."""
    folder = tmp_path_factory.mktemp("found")
    ranks = start_ranks(train_for_ever, 2, folder, seconds=200)
    while not all((folder / str(rank)).exists() for rank in range(2)):
        ranks._check_failures()
        ranks._check_time()
    maps = [maps_of(process.pid) for process in ranks.processes]
    start = time.monotonic()
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    codes = ranks.wait()
    return {
        "found": [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)],
        "maps": maps,
        "codes": codes,
        "seconds": time.monotonic() - start,
    }


def test_all_ranks_share_memory_or_none_does(killed):
    for found in killed["found"]:
        assert found["as it is"]
        assert found["on one machine"] == "NodeMemory"
        for name in ("none to be had", "too large", "not to be opened", "another file at that place", "another system"):
            assert found[name] is False, name
        for name in ("over the network", "on machines", "sixteen bits"):
            assert found[name] == "NetworkExchange", name


def test_memory_that_nobody_uses_any_more_is_given_back(killed):
    for found in killed["found"]:
        assert found["mapped"] == []
        assert found["files"] == 0


def test_a_killed_rank_leaves_nothing_behind(killed):
    inodes = [{*KEPT.findall(maps)} for maps in killed["maps"]]
    assert inodes[0] == inodes[1]
    assert len(inodes[0]) == 1  # one file without a name, and none in a folder that would outlive them
    assert all("/dev/shm/" not in maps for maps in killed["maps"])
    assert killed["codes"][1] == -signal.SIGKILL
    assert killed["codes"][0] > 0  # the other one is told by its connection, and does not wait for ever
    assert killed["seconds"] < 60
    kept = [pid for pid in os.listdir("/proc") if pid.isdigit() and inodes[0] & {*KEPT.findall(maps_of(pid))}]
    assert kept == []
