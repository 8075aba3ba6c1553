"""Dropout, whose random numbers take torch longer on a CPU than the linear layer before it.

torch draws each number by its generator, one after the other: 2 ms for 2,168 tokens of 64 on one core. Here its
generator draws one number, the key, and a hash counts on from it: 0.03 ms. So a run that is resumed repeats them, and
the mask need not be kept, as backward draws it again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from contrastive.encoders.dropout_kernels import LEVELS, drop, fill_words


class Chances(NamedTuple):
    """What decides which numbers are kept: those whose chance, of 65,536, is below `kept`.

    The share that is dropped is rounded to 1 / 65,536, and `scale` is that of the rounded share.
    """

    key: int
    kept: np.uint16
    scale: np.float32

    @classmethod
    def draw(cls, share: float) -> Chances:
        """Draw a key from torch's generator; without a share to drop, from nowhere."""
        if not share:
            return cls(0, np.uint16(0), np.float32(1))
        kept = min(max(1, round((1 - share) * LEVELS)), LEVELS - 1)
        key = int(torch.empty((), dtype=torch.int64).random_())
        return cls(key, np.uint16(kept), np.float32(LEVELS / kept))

    def numbers(self, size: int) -> NDArray[np.uint16]:
        """Give at least `size` numbers below LEVELS; none where all is kept."""
        words = np.empty(-(-size // 4) if self.kept else 0, np.uint64)
        fill_words(np.uint64(self.key), words)
        return words.view(np.uint16)


def dropout(x: Tensor, share: float) -> Tensor:
    """Zero a share of the numbers of `x`, and scale up the others so that the expectation stays.

    On the CPU in float32 it is ours, with derivatives of any order; elsewhere torch's.
    """
    if not share:
        return x
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return functional.dropout(x, share)
    out: Tensor = _Dropout.apply(x, Chances.draw(share))  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, chances: Chances) -> Tensor:
        out = torch.empty(x.shape)
        numbers = chances.numbers(x.numel())
        drop(x.detach().contiguous().view(-1).numpy(), numbers, chances.kept, chances.scale, out.view(-1).numpy())
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Chances], output: Tensor) -> None:
        ctx.chances = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Dropout.apply(gradient, ctx.chances), None  # type: ignore[no-untyped-call]
