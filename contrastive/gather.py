"""Brings all ranks' vectors together, with gradients that find their way back to the rank they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlrm.distributed.ranks import Ranks


def gather_ranks(ranks: Ranks) -> Callable[[Tensor], Tensor]:
    """Return what maps a rank's vectors [b, dim] to those of all ranks [B, dim], in the order of ranks.

    Backward gives each rank the sum of what all ranks say of its vectors. Both are collective calls, and they have a
    process group of their own, so that their order among other messages does not matter.
    """
    group = dist.new_group(timeout=ranks.timeout)

    def gather(vectors: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(vectors, ranks, group)  # type: ignore[no-untyped-call]
        return gathered

    return gather


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
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.split(ctx.counts)[ctx.ranks.rank], None, None


def _count(vectors: Tensor, ranks: Ranks, group: Any) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.int64, device=vectors.device) for _ in range(ranks.count)]
    dist.all_gather(counts, torch.tensor([len(vectors)], device=vectors.device), group=group)
    return [int(count) for count in counts]
