"""Brings all ranks' vectors together, with gradients that find their way back to the rank they came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlrm.distributed.ranks import Ranks


class RankGather:
    """Maps a rank's vectors [b, dim] to those of all ranks [B, dim], in the order of ranks.

    Backward gives each rank the sum of what all ranks say of its vectors. Both are collective calls, and they have a
    process group of their own, so that their order among other messages does not matter.

    Args:
        ranks: more than one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._group = ranks, dist.new_group(timeout=ranks.timeout)
        self._last: Tensor | None = None
        self._is_repeating = False

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the vectors of all ranks."""
        if self._is_repeating and self._last is not None:
            return self._last.detach()
        gathered: Tensor = _Gather.apply(vectors, self._ranks, self._group)  # type: ignore[no-untyped-call]
        self._last = gathered
        return gathered

    def stand_in(self) -> None:
        """Take part in the backward pass that others run of what was gathered last, with nothing to say."""
        if self._last is not None and self._last.requires_grad:
            dist.all_reduce(torch.zeros_like(self._last), group=self._group)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Give again what was gathered last, without asking anybody."""
        self._is_repeating = True
        try:
            yield
        finally:
            self._is_repeating = False


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ranks: Ranks, group: Any) -> Tensor:
        ctx.counts, ctx.ranks, ctx.group = _count(vectors, ranks, group), ranks, group
        # Messages of one size: shares of a batch differ by a sample.
        padded = vectors.new_zeros(max(ctx.counts), vectors.shape[1])
        padded[: len(vectors)] = vectors
        parts = [torch.empty_like(padded) for _ in ctx.counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, ctx.counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd's own is not ours to write to
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.counts)[ctx.ranks.rank], None, None


def _count(vectors: Tensor, ranks: Ranks, group: Any) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=vectors.device) for _ in range(ranks.count)]
    dist.all_gather(counts, torch.tensor([len(vectors)], device=vectors.device), group=group)
    return [int(count) for count in counts]
