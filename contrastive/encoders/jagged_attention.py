"""Attention by our kernels as operators of torch: on the CPU in float32, without padding, with first derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from contrastive.encoders import attention_kernels, last_attention_kernels
from contrastive.encoders.dropout import Chances
from contrastive.encoders.jagged import Layout
from embeddings.kernels.threads import run_all

_HISTORIES_PER_TASK = 128
_NOTHING_HIDDEN = np.zeros(0, bool)


def attend(projected: Tensor, layout: Layout, heads: int, share: float) -> Tensor:
    """Compute what `bucketed_attention.attend` does."""
    out: Tensor = _Attend.apply(projected, layout, heads, Chances.draw(share))  # type: ignore[no-untyped-call]
    return out


def attend_from_last(queries: Tensor, vectors: Tensor, layout: Layout, share: float) -> tuple[Tensor, Tensor]:
    """Compute what `bucketed_attention.attend_from_last` does."""
    out: tuple[Tensor, Tensor] = _AttendFromLast.apply(  # type: ignore[no-untyped-call]
        queries, vectors, layout, Chances.draw(share)
    )
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, layout: Layout, heads: int, chances: Chances) -> Tensor:
        dim = projected.shape[1] // 3
        pairs = heads * np.concatenate([[0], np.cumsum(np.diff(layout.starts) ** 2)])
        weights, out = np.empty(pairs[-1], np.float32), torch.empty(len(projected), dim)
        numbers = chances.numbers(len(weights))
        where = layout.starts, pairs, layout.unmasked
        how = heads, dim, numbers, chances.kept, chances.scale, weights
        run_on_histories(
            partial(attention_kernels.attend, _flat(projected), *where, _hidden(layout), *how, _flat(out)), layout
        )
        ctx.save_for_backward(projected)
        ctx.where, ctx.how, ctx.layout = where, how, layout
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        (projected,) = ctx.saved_tensors
        out = torch.empty_like(projected, memory_format=torch.contiguous_format)
        arguments = _flat(projected), *ctx.where, *ctx.how, _flat(gradient), _flat(out)
        run_on_histories(partial(attention_kernels.attend_gradient, *arguments), ctx.layout)
        return out, None, None, None


class _AttendFromLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, layout: Layout, chances: Chances) -> tuple[Tensor, Tensor]:
        _, heads, dim = queries.shape
        weights = np.empty(heads * len(vectors), np.float32)
        sums, mass = torch.empty(queries.shape), torch.empty(queries.shape[:2])
        numbers = chances.numbers(len(weights))
        how = heads, dim, numbers, chances.kept, chances.scale, weights
        where = layout.starts, layout.unmasked, _hidden(layout)
        arguments = _flat(queries), _flat(vectors), *where, *how, _flat(sums), _flat(mass)
        run_on_histories(partial(last_attention_kernels.attend_from_last, *arguments), layout)
        ctx.save_for_backward(queries, vectors)
        ctx.how, ctx.layout = how, layout
        return sums, mass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, mass_gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        queries, vectors = ctx.saved_tensors
        out = torch.empty(queries.shape), torch.empty(vectors.shape)
        given = _flat(queries), _flat(vectors), ctx.layout.starts, *ctx.how, _flat(gradient), _flat(mass_gradient)
        kernel = partial(last_attention_kernels.attend_from_last_gradient, *given, _flat(out[0]), _flat(out[1]))
        run_on_histories(kernel, ctx.layout)
        return *out, None, None


def _refuse_second_derivative() -> None:
    # torch's own `once_differentiable` is silent, and the derivative wrong, where `torch.autograd.grad` is asked for
    # some tensors: the node that would raise is on the way to none of them.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "encoder: expected kernels with second derivatives, got compiled ones; set --encoder.kernels torch"
        )


def _hidden(layout: Layout) -> Any:
    return _NOTHING_HIDDEN if layout.hidden is None else layout.hidden.numpy()


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).numpy()


def run_on_histories(kernel: Callable[[int, int], None], layout: Layout) -> None:
    """Call a kernel with the first history and the one after the last, part by part, on torch's number of threads."""
    histories = len(layout.unmasked)
    starts = range(0, histories, _HISTORIES_PER_TASK)
    run_all([partial(kernel, start, min(start + _HISTORIES_PER_TASK, histories)) for start in starts])
