"""BSARec's filter: a history's slow part stays as it is, and the rest is scaled, by a learned factor a column."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from contrastive.encoders.dropout import dropout
from contrastive.encoders.frequency_kernels import project_on_waves
from contrastive.encoders.jagged import Layout
from contrastive.encoders.jagged_attention import run_on_histories
from contrastive.encoders.self_attention import NORM_EPS


class FrequencyFilter(nn.Module):
    """LN(x + dropout(low + beta^2 (x - low))), eq. 8 and 9 of Shin et al. 2024 (arXiv:2312.10325).

    low is what the lowest cutoff // 2 + 1 frequencies of the discrete Fourier transform over `window` positions give,
    with zeros where the history is shorter. It is a projection on a handful of cosines and sines, so that two thin
    products of the history's own length take the place of the transform over the whole window; where in the window a
    history stands does not matter.

    The published code pads with the row of PAD and a position, normalised, instead of zeros, and encodes padding like
    items. This is left out here: it is 50 / 8 of the work on Beauty.

    Args:
        dim: length of a vector.
        window: positions of the transform.
        cutoff: c of the paper.
        dropout: share of the output that is zeroed in training.
    """

    basis: Tensor

    def __init__(self, dim: int, window: int, cutoff: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.register_buffer("basis", slow_waves(window, cutoff), persistent=False)
        self.beta = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map the vectors of all slots [S, dim] to others."""
        return self._finish(x, slow_part(x, self.basis, layout))

    def from_last(self, x: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """Compute `forward` of each history's last item alone, [B, dim]."""
        return self._finish(last, slow_part(x, self.basis, layout).index_select(0, layout.last))

    def _finish(self, x: Tensor, low: Tensor) -> Tensor:
        filtered = low + self.beta.square() * (x - low)
        out: Tensor = self.norm(x + dropout(filtered, self.dropout if self.training else 0.0))
        return out


def slow_waves(window: int, cutoff: int) -> Tensor:
    """The orthonormal cosines and sines of the frequencies 0 to cutoff // 2, [window, number of waves] float64."""
    steps = torch.arange(window, dtype=torch.float64)
    waves = [torch.full((window,), 1 / math.sqrt(window), dtype=torch.float64)]
    for frequency in range(1, min(cutoff // 2, window // 2) + 1):
        angles = steps * (2 * math.pi * frequency / window)
        if 2 * frequency == window:
            waves.append(angles.cos() / math.sqrt(window))
        else:
            waves += [angles.cos() * math.sqrt(2 / window), angles.sin() * math.sqrt(2 / window)]
    return torch.stack(waves, dim=1)


def slow_part(x: Tensor, basis: Tensor, layout: Layout) -> Tensor:
    """Project each history on the waves: [S, dim] like `x`; what padding gets is of no meaning."""
    if layout.buckets is None:
        low: Tensor = _SlowPart.apply(x, basis, layout)  # type: ignore[no-untyped-call]
        return low
    shown = x if layout.real is None else x * layout.real[:, None]
    parts: list[Tensor] = []
    sizes = [bucket.count * bucket.width for bucket in layout.buckets]
    for bucket, slots in zip(layout.buckets, shown.split(sizes), strict=True):
        waves = basis[: bucket.width].to(x.dtype)
        histories = slots.view(bucket.count, bucket.width, -1)
        parts.append((waves @ (waves.mT @ histories)).flatten(0, 1))
    return torch.cat(parts)


class _SlowPart(torch.autograd.Function):
    """A projection: symmetric, so that its gradient is the same once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, basis: Tensor, layout: Layout) -> Tensor:
        ctx.basis, ctx.layout = basis, layout
        out = torch.empty(x.shape)
        waves = basis.T.float().contiguous().numpy()
        arrays = x.detach().contiguous().view(-1).numpy(), waves, layout.starts, x.shape[1], out.view(-1).numpy()
        run_on_histories(partial(project_on_waves, *arrays), layout)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _SlowPart.apply(gradient, ctx.basis, ctx.layout), None, None  # type: ignore[no-untyped-call]
