"""The dot interaction as batched products, two in all: what a GPU is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def batched_dots(dense: Tensor, pooled: Tensor) -> Tensor:
    """Compute what `dlrm.pairwise_dots.pairwise_dots` does, in autocast's type where that is on.

    torch's own gradient of picking pairs from a matrix adds number by number, and it multiplies twice, once for each
    side. With G the symmetric matrix of the pairs' gradients, both sides together are G V, and G is picked as well.
    """
    kind = dense.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pooled.dtype
    dense, pooled = dense.to(dtype), pooled.to(dtype)
    batch_size, dim = dense.shape
    vectors = torch.cat([dense, pooled], dim=1).view(batch_size, 1 + pooled.shape[1] // dim, dim)
    return torch.cat([dense, _Pairs.apply(vectors)], dim=1)  # type: ignore[no-untyped-call]


class _Pairs(torch.autograd.Function):
    """Maps vectors [batch_size, count, dim] to the products of all pairs."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(vectors)
        count = vectors.shape[1]
        rows, columns = torch.tril_indices(count, count, offset=-1, device=vectors.device)
        return torch.bmm(vectors, vectors.mT).flatten(1).index_select(1, rows * count + columns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (vectors,) = ctx.saved_tensors
        batch_size, count, _ = vectors.shape
        # One column more, of zeros, for the matrix' diagonal.
        pairs = torch.nn.functional.pad(gradient, (0, 1))
        number = torch.arange(count, device=gradient.device)
        larger, smaller = torch.maximum(number[:, None], number), torch.minimum(number[:, None], number)
        places = torch.where(larger == smaller, gradient.shape[1], larger * (larger - 1) // 2 + smaller)
        symmetric = pairs.index_select(1, places.flatten()).view(batch_size, count, count)
        return torch.bmm(symmetric, vectors)
