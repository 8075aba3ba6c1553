"""The dot interaction as one torch operator: our kernels on the CPU in float32, batched products elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlrm import dot_kernels
from dlrm.batched_dots import batched_dots
from embeddings.kernels.threads import run_all

_SAMPLES_PER_TASK = 256


def pairwise_dots(dense: Tensor, pooled: Tensor) -> Tensor:
    """Multiplies all pairs of a sample's vectors.

    Args:
        dense: The first vector of each sample, [batch_size, dim].
        pooled: The others side by side, [batch_size, (num_vectors - 1) * dim].

    Returns:
        [batch_size, dim + num_vectors * (num_vectors - 1) / 2]: ``dense``, then the products of vectors i > j in the
        order (1, 0), (2, 0), (2, 1), (3, 0), ... Under autocast on the CPU it is float32.
    """
    if dense.device.type == "cpu" and torch.float64 not in (dense.dtype, pooled.dtype):
        out: Tensor = _pairwise_dots_on_cpu(dense.float(), pooled.float())
        return out
    return batched_dots(dense, pooled)


def pairwise_dots_by_products(dense: Tensor, pooled: Tensor) -> Tensor:
    """Computes the same with torch's own operators, on any device and in any precision."""
    batch_size, dim = dense.shape
    count = 1 + pooled.shape[1] // dim
    vectors = torch.cat([dense.to(pooled.dtype), pooled], dim=1).view(batch_size, count, dim)
    i, j = torch.tril_indices(count, count, offset=-1, device=dense.device)
    return torch.cat([dense, torch.bmm(vectors, vectors.mT)[:, i, j]], dim=1)


@torch.library.custom_op("recforge::pairwise_dots", mutates_args=(), device_types="cpu")
def _pairwise_dots_on_cpu(dense: Tensor, pooled: Tensor) -> Tensor:
    out = _empty_output(dense, pooled)
    _run_by_samples(partial(dot_kernels.pairwise_dots, *_arrays(dense, pooled, out)), len(dense))
    return out


@torch.library.custom_op("recforge::pairwise_dots_gradient", mutates_args=(), device_types="cpu")
def _gradient_on_cpu(dense: Tensor, pooled: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(dense.shape), torch.empty(pooled.shape)
    arrays = _arrays(dense, pooled, gradient, *out)
    _run_by_samples(partial(dot_kernels.pairwise_dots_gradient, *arrays), len(dense))
    return out


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.contiguous().numpy() for tensor in tensors)


def _run_by_samples(kernel: Callable[[int, int], None], batch_size: int) -> None:
    starts = range(0, batch_size, _SAMPLES_PER_TASK)
    run_all([partial(kernel, start, min(start + _SAMPLES_PER_TASK, batch_size)) for start in starts])


def _empty_output(dense: Tensor, pooled: Tensor) -> Tensor:
    batch_size, dim = dense.shape
    count = 1 + pooled.shape[1] // dim
    return dense.new_empty(batch_size, dim + count * (count - 1) // 2)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    dense_gradient, pooled_gradient = _gradient_on_cpu(*ctx.saved_tensors, gradient)
    return dense_gradient, pooled_gradient


_pairwise_dots_on_cpu.register_fake(_empty_output)
_pairwise_dots_on_cpu.register_autograd(_backward, setup_context=_save_inputs)
_gradient_on_cpu.register_fake(lambda dense, pooled, gradient: (torch.empty_like(dense), torch.empty_like(pooled)))
