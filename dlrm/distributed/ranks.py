"""Who else trains: this process's place among the ranks of a run, and the few things they settle among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among the ranks.

    Attributes:
        rank: from 0.
        count: of all ranks; 1 is a process of its own, for which nothing below communicates.
        per_node: ranks that share a machine.
        device: where small tensors must lie to be exchanged.
        timeout: after which a collective call fails, also in further groups; None is torch's own.
    """

    rank: int = 0
    count: int = 1
    per_node: int = 1
    device: str = "cpu"
    timeout: timedelta | None = None

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
        summed: list[float] = self.sum_tensor(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return summed

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor on the CPU (a collective call)."""
        if self.count == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's float64 numbers, of which all give as many, by rank (a collective call)."""
        if self.count == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(gathered, own)
        return [given.tolist() for given in gathered]

    def barrier(self) -> None:
        """Wait for all ranks (a collective call)."""
        if self.count > 1:
            dist.barrier()

    def from_first(self, tensor: Tensor) -> Tensor:
        """Overwrite ``tensor`` with rank 0's and return it (a collective call)."""
        if self.count > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, thing: T) -> list[T]:
        """Return what every rank gives, in their order; for small things that pickle (a collective call)."""
        if self.count == 1:
            return [thing]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, thing)
        return gathered

    def object_from_first(self, thing: T) -> T:
        """Return what rank 0 gives; for small things that pickle (a collective call)."""
        if self.count == 1:
            return thing
        given: list[Any] = [thing]
        dist.broadcast_object_list(given, src=0, device=torch.device(self.device))
        first: T = given[0]
        return first

    def raise_any(self, error: ValueError | None) -> None:
        """Raise the error of the first rank that has one, on every rank (a collective call)."""
        for other in self.gather(error):
            if other is not None:
                raise other


ALONE = Ranks()
