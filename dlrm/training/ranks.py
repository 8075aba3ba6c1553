"""Who else trains: this process's place among the ranks of a run, and the few things they settle among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among the ranks.

    Attributes:
        rank: from 0.
        count: of all ranks; 1 is a process of its own, for which nothing below communicates.
        per_node: ranks that share a machine.
        device: where small tensors must lie to be exchanged.
    """

    rank: int = 0
    count: int = 1
    per_node: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: it logs, and writes what exists once."""
        return self.rank == 0

    def share_of(self, samples: int) -> tuple[int, int]:
        """Return (first, count) of this rank's samples of a global batch; shares differ by at most 1, and may be 0."""
        first, last = samples * self.rank // self.count, samples * (self.rank + 1) // self.count
        return first, last - first

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums over ranks of float64 numbers (a collective call)."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def barrier(self) -> None:
        """Wait for all ranks (a collective call)."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite ``tensor`` with rank 0's and return it (a collective call)."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor
