"""How the bottom MLP's output and the pooled rows meet: one module per kind, all of one form.

``forward(dense, pooled) -> [batch_size, out_dim]`` with ``dense`` [batch_size, dim] and ``pooled`` [batch_size, sum of
dims], the vectors of all features side by side as tables give them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlrm.pairwise_dots import pairwise_dots


class DotInteraction(nn.Module):
    """Dot products between vectors, beside the bottom MLP's output itself.

    Without ``projection``: the products of all pairs (Naumov et al. 2019, arXiv:1906.00091). With it: the products of
    each vector with ``projection`` learned linear combinations of all vectors, X (P X)^T, whose cost and width grow
    with the number of vectors instead of with its square (the optimised factorisation machine of Wukong, Zhang et al.
    2024, arXiv:2403.02545; torchrec's ``InteractionProjectionArch`` is a cousin).

    Args:
        num_vectors: Vectors per sample, the bottom MLP's output included.
        dim: Their common length.
        projection: Number of combinations; None means all pairs.

    Raises:
        ValueError: In forward, when the vectors are not ``num_vectors`` of ``dim``.
    """

    def __init__(self, num_vectors: int, dim: int, projection: int | None = None) -> None:
        super().__init__()
        self.num_vectors, self.dim = num_vectors, dim
        self.combinations: nn.Parameter | None = None
        if projection is None:
            self.out_dim = dim + num_vectors * (num_vectors - 1) // 2
        else:
            self.out_dim = dim + num_vectors * projection
            self.combinations = nn.Parameter(torch.randn(projection, num_vectors) * num_vectors**-0.5)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Give ``dense``, then the products: pairs (i, j < i) by i, or by vector and combination."""
        _check_widths(self, dense, pooled)
        if self.combinations is None:
            return pairwise_dots(dense, pooled)
        vectors = torch.cat([dense.to(pooled.dtype), pooled], dim=1).view(-1, self.num_vectors, self.dim)
        products = torch.matmul(vectors, torch.matmul(self.combinations, vectors).mT)
        return torch.cat([dense, products.flatten(1)], dim=1)


class CrossInteraction(nn.Module):
    """The cross network of DCN-v2 with weights of low rank (Wang et al. 2021, arXiv:2008.13535, eq. 1 and 2).

    With x_0 the bottom MLP's output and all pooled rows side by side, each layer computes
    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l. Dims may differ.

    Args:
        in_dim: Length of x_0.
        rank: Rows of V.
        layers: Number of layers.
    """

    def __init__(self, in_dim: int, rank: int, layers: int) -> None:
        super().__init__()
        self.out_dim = in_dim
        self.down = nn.ModuleList(nn.Linear(in_dim, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, in_dim) for _ in range(layers))
        for linear in (*self.down, *self.up):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Give x after the last layer."""
        start = torch.cat([dense, pooled], dim=1)
        crossed = start
        for down, up in zip(self.down, self.up, strict=True):
            crossed = torch.addcmul(crossed, start, up(down(crossed)))
        return crossed


class FactorizationMachine(nn.Module):
    """Second-order factorisation machine, one output per component (Rendle 2010; Guo et al. 2017, arXiv:1703.04247).

    Three blocks of ``dim``: the bottom MLP's output; the sum of the pooled vectors; and, over all vectors v,
    ((sum v)^2 - sum v^2) / 2, the componentwise products of all pairs. The second block is the first-order part: a
    linear layer on it is a weight per id, so that without hidden layers above this contains a logistic regression on
    ids, without a second table of weights.

    Args:
        num_vectors: Vectors per sample, the bottom MLP's output included.
        dim: Their common length.

    Raises:
        ValueError: In forward, when the vectors are not ``num_vectors`` of ``dim``.
    """

    def __init__(self, num_vectors: int, dim: int) -> None:
        super().__init__()
        self.num_vectors, self.dim = num_vectors, dim
        self.out_dim = 3 * dim

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        """Give the three blocks side by side."""
        _check_widths(self, dense, pooled)
        vectors = pooled.view(-1, self.num_vectors - 1, self.dim)
        first_order = vectors.sum(dim=1)
        total = first_order + dense
        squares = vectors.square().sum(dim=1) + dense.square()
        return torch.cat([dense, first_order, (total.square() - squares) / 2], dim=1)


def _check_widths(interaction: DotInteraction | FactorizationMachine, dense: Tensor, pooled: Tensor) -> None:
    expected = interaction.dim, (interaction.num_vectors - 1) * interaction.dim
    got = dense.shape[1], pooled.shape[1]
    if got != expected:
        raise ValueError(
            f"{type(interaction).__name__}: expected a bottom MLP's output of width {expected[0]} and pooled rows of "
            f"width {expected[1]} ({interaction.num_vectors - 1} features), got {got[0]} and {got[1]}"
        )
