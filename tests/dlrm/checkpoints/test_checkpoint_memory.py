"""Nobody gathers a table: ranks that save or restore need room for their own rows, and touch no other's files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

MEGABYTES = 128  # of rows on each of two ranks; some 4 MB blocks at a time must be few beside them

# Each rank saves its rows, twice, and then restores its columns; tells by how much that raised its peak of memory, and
# which files it has opened meanwhile.
RANKS = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch, torch.distributed as dist
    from dlrm.checkpoints.checkpoint import CheckpointStore
    from dlrm.checkpoints.pieces import PartedTensor, Parts, piece_of
    from dlrm.distributed.ranks import Ranks

    folder, ROWS = Path(sys.argv[1]), int(sys.argv[2]) << 14
    opened = set()

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path = os.fspath(arguments[0])
            if "safetensors" in path and str(folder) in path:
                opened.add(os.path.basename(path))

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def measure(work):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = status("VmRSS")
        opened.clear()
        work()
        return {"megabytes": status("VmHWM") - before, "opened": sorted(opened)}

    def act(rank):
        store = dist.FileStore(str(folder / "meeting"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        checkpoints = CheckpointStore(folder / "checkpoints", ranks=Ranks(rank=rank, count=2))
        rows = torch.full((ROWS, 16), rank + 1.0)
        columns = torch.zeros(2 * ROWS, 8)

        def save(samples):
            shape, pieces = (2 * ROWS, 16), (piece_of(rows, (ROWS * rank, 0)),)
            tables = Parts({"a.weight": PartedTensor(shape=shape, dtype=torch.float32, pieces=pieces)})
            checkpoints.save({"tables": tables, "dense": torch.ones(1)}, samples=samples)
            checkpoints.wait()

        def restore():
            checkpoints.restore_latest().state["tables"]["a.weight"].read_into(columns, (0, 8 * rank))

        said = [measure(lambda: save(1)), measure(lambda: save(2))]
        del rows
        columns.fill_(-1.0)
        said.append(measure(restore))
        assert columns[:ROWS].unique().tolist() == [1.0] and columns[ROWS:].unique().tolist() == [2.0]
        (folder / f"{rank}.json").write_text(json.dumps(said))
        dist.barrier()

    torch.set_num_threads(1)
    child = os.fork()
    sys.addaudithook(note)
    act(0 if child else 1)
    if not child:
        os._exit(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
)


def test_ranks_need_room_for_their_own_rows_only(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RANKS, str(tmp_path), str(MEGABYTES)], check=True, timeout=300)
    written = {path.name: path.stat().st_size for path in tmp_path.glob("checkpoints/*2/*tables.safetensors")}
    assert set(written) == {"tables.safetensors", "rank-00001.tables.safetensors"}
    assert all(MEGABYTES << 20 < size < (MEGABYTES << 20) + 1000 for size in written.values())
    for rank in range(2):
        first, second, restored = measured = json.loads((tmp_path / f"{rank}.json").read_text())
        told: Any = (rank, measured)
        assert first["megabytes"] < 1.5 * MEGABYTES, told  # a copy of the rows
        assert second["megabytes"] < 0.5 * MEGABYTES, told  # which is used again
        assert restored["megabytes"] < 0.5 * MEGABYTES, told  # blocks of 4 MB
        own = ["rank-00001.tables.safetensors"] if rank else ["dense.safetensors", "tables.safetensors"]
        assert first["opened"] == second["opened"] == own, told
        assert set(restored["opened"]) >= set(written), told
