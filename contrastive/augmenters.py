"""Learned augmentation: two small networks that make further views of what the encoder says of two views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6
"""Shortest length by which an output is divided; the published code divides by zero where weights are zero."""


class Augmenter(nn.Module):
    """Linear, GELU, Linear, GELU, Linear, and a length of one.

    Args:
        dim: Length of the vectors that come and go.
        widths: Hidden layers.
    """

    def __init__(self, dim: int, widths: Sequence[int] = (32, 16)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((dim, *widths, dim)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, dim] -> [B, dim]."""
        for layer in self.layers[:-1]:
            hidden = F.gelu(layer(hidden))
        return F.normalize(self.layers[-1](hidden), dim=1, eps=_EPS)


class Augmenters(nn.Module):
    """The two augmenters of MCLRec, one for each view; needed in training only.

    Args:
        dim: Length of the vectors that come and go.
        widths: Hidden layers of each.
        shared: One augmenter for both views (an ablation).
    """

    def __init__(self, dim: int, widths: Sequence[int] = (32, 16), *, shared: bool = False) -> None:
        super().__init__()
        self.first = Augmenter(dim, widths)
        self.second = self.first if shared else Augmenter(dim, widths)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """A further view of each view, [B, dim] each."""
        return self.first(first), self.second(second)


def augment_frozen(augmenters: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the augmenters' weights as constants: gradients pass through to the views only."""
    weights = [weight for weight in augmenters.parameters() if weight.requires_grad]
    try:
        # torch.func.functional_call does without the switch, but loses the weights of a module that is in two places
        for weight in weights:
            weight.requires_grad_(False)
        views: tuple[Tensor, Tensor] = augmenters(first, second)
    finally:
        for weight in weights:
            weight.requires_grad_()
    return views
