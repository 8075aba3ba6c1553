"""The same pull and push as the parameter server's, as one would write them with ``torch.distributed.rpc``.

Two servers: rows in a tensor, found by ``searchsorted`` and updated by torch; and our own table of rows behind rpc.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import rpc

LEARNING_RATE, EPS = 0.01, 1e-8
THREADS = 4
_HERE: dict[str, Any] = {}  # what this process serves


class TensorTable:
    """Rows in the order of their ids, with row-wise Adagrad."""

    def __init__(self, ids: Tensor, dim: int) -> None:
        self.ids = ids.sort().values
        self.weight = torch.zeros(ids.numel(), dim).uniform_(-0.01, 0.01)
        self.sums = torch.zeros(ids.numel())

    def pull(self, ids: Tensor, is_half: bool) -> Tensor:
        """Reads rows."""
        rows = self.weight.index_select(0, torch.searchsorted(self.ids, ids))
        return rows.half() if is_half else rows

    def push(self, ids: Tensor, gradients: Tensor) -> None:
        """Updates rows; ids are there once."""
        places, gradients = torch.searchsorted(self.ids, ids), gradients.float()
        sums = self.sums.index_select(0, places).add_(gradients.square().mean(dim=1))
        self.sums.index_copy_(0, places, sums)
        step = gradients.mul_((-LEARNING_RATE / (sums.sqrt_() + EPS)).unsqueeze(1))
        self.weight.index_add_(0, places, step)


class OurTable:
    """Our own table; the interpreter's lock is let go by its kernels only."""

    def __init__(self, ids: Tensor, dim: int) -> None:
        from threading import Lock

        from benchmarks.parameter_server_processes import Shape, describe
        from embeddings.hashed.hashed_table import HashedTable
        from parameter_server.partition import salt_of

        config = describe(Shape(dim=dim), "none").tables[0]
        self._lock, self.table, self._updates = Lock(), HashedTable(config, seed=0, salt=salt_of(config.name)), 0
        for some in ids.split(20_000):
            self.push(some, torch.zeros(some.numel(), dim))

    def pull(self, ids: Tensor, is_half: bool) -> Tensor:
        """Reads rows."""
        out = np.empty((ids.numel(), self.table.config.dim), np.float16 if is_half else np.float32)
        with self._lock:
            self.table.pull(ids.numpy(), out)
        return torch.from_numpy(out)

    def push(self, ids: Tensor, gradients: Tensor) -> None:
        """Updates rows."""
        with self._lock:
            self._updates += 1
            self.table.push(ids.numpy(), gradients.numpy(), updates=self._updates, now=0.0)


def pull(kind: str, ids: Tensor, is_half: bool) -> Tensor:
    """Runs on the server."""
    rows: Tensor = _HERE[kind].pull(ids, is_half)
    return rows


def push(kind: str, ids: Tensor, gradients: Tensor) -> None:
    """Runs on the server."""
    _HERE[kind].push(ids, gradients)


def fill(num_rows: int, dim: int) -> None:
    """Makes the server's tables."""
    ids = torch.arange(num_rows)
    _HERE["tensor"], _HERE["ours"] = TensorTable(ids, dim), OurTable(ids, dim)


@contextmanager
def joined(rank: int, port: int, *, over_tcp: bool) -> Iterator[None]:
    """Takes part, as the server (0) or its client (1).

    Args:
        rank: Of this process.
        port: Of both processes' meeting place.
        over_tcp: As between two machines; else by shared memory, where rpc finds that it can.
    """
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ways: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if over_tcp else {}
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=THREADS, rpc_timeout=120, **ways)
    rpc.init_rpc(("server", "client")[rank], rank=rank, world_size=2, rpc_backend_options=options)
    try:
        yield
    finally:
        rpc.shutdown()


def main() -> None:
    """Serves until the client leaves."""
    from embeddings.allocation import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    print("ready", flush=True)
    with joined(0, int(sys.argv[1]), over_tcp=sys.argv[2] == "tcp"):
        pass


if __name__ == "__main__":
    # rpc finds functions by their module's name, which must not be __main__
    from benchmarks.parameter_server_rpc import main as imported_main

    imported_main()
