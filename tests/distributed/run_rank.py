"""One rank of a test: joins the others, calls a function of a test's file and leaves what it returned."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: Path, rank: int, count: int, seconds: float) -> None:
    file, name, arguments = pickle.loads((folder / "call.pickle").read_bytes())
    spec = importlib.util.spec_from_file_location("ranks_under_test", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_under_test"] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    function = getattr(module, name)
    backend = getattr(function, "backend", "gloo")  # what ranks with a GPU set
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timedelta(seconds=seconds))
    result = function(rank, count, *arguments)
    (folder / f"result_{rank}.pickle").write_bytes(pickle.dumps(result))
    # One that leaves while others still talk to it would be an error of theirs.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
