"""Memory that all ranks of one machine share: vectors are written where who asked for them reads them."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from embeddings.sharded.lanes import Lanes
from embeddings.sharded.vector_exchange import Places

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_AREA_BYTES = 1 << 34  # of addresses, per rank and area; memory is taken as it is written to
_AREAS = 2
_NUMBER_BYTES = 4
_TOKEN_BYTES = 16


class NodeMemory:
    """The exchange of vectors and gradients between ranks that share a machine, in float32.

    Who holds the rows writes a cell's vector straight into the memory of who asked, who writes its gradient there in
    turn, so that nothing is copied and only a barrier is sent. The memory is a file without a name, which the system
    frees with the last process that has it open, however that ends. Exchanges take turns with two areas: what one wrote
    has been read by all when the next one's barrier is passed, and only the one after that overwrites it.

    Args:
        memory: [areas, ranks, numbers] float32.
        lanes: Of the plan.
        rank: This rank.
    """

    def __init__(self, memory: Tensor, lanes: Lanes, rank: int) -> None:
        self._memory, self._lanes, self._rank = memory, lanes, rank
        self._area = 0

    def lay(self, num_cells: Longs, asked_of: Longs, asked_from: Longs) -> Places:
        """Finds a place for each vector; see ``VectorExchange``."""
        lanes, per_rank = self._lanes, self._memory.shape[2]
        mine = slice(lanes.owners[self._rank], lanes.owners[self._rank + 1])
        numbers = num_cells[lanes.cut] * lanes.width
        size = int(numbers.sum())
        if size > per_rank:
            raise ValueError(
                f"batch: expected vectors of at most {_NUMBER_BYTES * per_rank} bytes on a rank, got "
                f"{_NUMBER_BYTES * size}; make the batch smaller"
            )
        asked = asked_of * lanes.width[mine]
        first = np.arange(lanes.ranks) * per_rank + asked_from
        sizes = [int(numbers[lanes.owners[r] : lanes.owners[r + 1]].sum()) for r in range(lanes.ranks)]
        asked_sizes = asked.sum(axis=1).tolist()
        sizes[self._rank] = asked_sizes[self._rank] = 0
        return Places(
            size=size,
            starts=self._rank * per_rank + np.cumsum(numbers) - numbers,
            asked_starts=first[:, None] + np.cumsum(asked, axis=1) - asked,
            asked_sizes=asked_sizes,
            sizes=sizes,
        )

    def open(self, places: Places) -> Tensor:
        """Returns the flat tensor that the next exchange writes and reads."""
        self._area = (self._area + 1) % _AREAS
        return self._memory[self._area].view(-1)

    def send_vectors(self, vectors: Tensor, places: Places) -> int:
        """Waits until all ranks have written; returns the bytes that this one wrote for others."""
        dist.barrier()
        return _NUMBER_BYTES * sum(places.asked_sizes)

    def send_gradients(self, vectors: Tensor, places: Places) -> int:
        """Waits until all ranks have written; returns the bytes that this one wrote for others."""
        dist.barrier()
        return _NUMBER_BYTES * sum(places.sizes)


def span_memory(one: Floats, other: Floats) -> tuple[Floats, int, int]:
    """Makes one array of two [n], [m], so that a kernel reads or writes both.

    It reaches from the first number of the one that comes first in memory to the last of the other. What lies between
    belongs to neither and must not be touched. Whoever calls keeps both alive.

    Returns:
        The array, flat, and where each of the two begins in it.
    """
    low, high = (one, other) if one.ctypes.data < other.ctypes.data else (other, one)
    distance = (high.ctypes.data - low.ctypes.data) // _NUMBER_BYTES
    spanned = np.lib.stride_tricks.as_strided(low, (distance + high.size,), (_NUMBER_BYTES,))
    return (spanned, 0, distance) if low is one else (spanned, distance, 0)


def share_memory(lanes: Lanes, rank: int) -> NodeMemory | None:
    """Shares memory between all ranks, or returns None on each of them where that cannot be (a collective call).

    It needs Linux, one machine, and the right to open the files of rank 0.
    """
    file, memory = -1, None
    offer: list[tuple[str, bytes]] = [("", b"")]
    if rank == 0:
        with contextlib.suppress(OSError, AttributeError):
            file = os.memfd_create("recforge")
            offer = [(f"/proc/{os.getpid()}/fd/{file}", _prepare(file, lanes.ranks))]
    try:
        dist.broadcast_object_list(offer, src=0)
        with contextlib.suppress(OSError, ValueError):
            memory = _open(*offer[0], lanes.ranks)
        everywhere = torch.tensor([memory is not None], dtype=torch.int32)
        # The first rank keeps the file open until all have opened it.
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    finally:
        if file >= 0:
            os.close(file)
    return NodeMemory(memory, lanes, rank) if memory is not None and bool(everywhere) else None


def _prepare(file: int, ranks: int) -> bytes:
    token = os.urandom(_TOKEN_BYTES)
    os.ftruncate(file, _AREAS * ranks * _AREA_BYTES + _TOKEN_BYTES)
    os.pwrite(file, token, _AREAS * ranks * _AREA_BYTES)
    return token


def _open(path: str, token: bytes, ranks: int) -> Tensor:
    file = os.open(path, os.O_RDWR)
    try:
        size = _AREAS * ranks * _AREA_BYTES
        # On another machine, or in another container, the path may lead to another file.
        if os.pread(file, _TOKEN_BYTES, size) != token:
            raise ValueError(f"expected the file of rank 0 at {path}, got another one")
        numbers = np.frombuffer(mmap.mmap(file, size), np.float32)
    finally:
        os.close(file)
    return torch.from_numpy(numbers).view(_AREAS, ranks, -1)
