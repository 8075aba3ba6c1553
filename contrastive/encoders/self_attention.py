"""Causal self-attention of histories, with all that surrounds it in a layer: projections, residual, norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from contrastive.encoders import bucketed_attention, jagged_attention
from contrastive.encoders.dropout import dropout
from contrastive.encoders.jagged import Layout

NORM_EPS = 1e-12


class SelfAttention(nn.Module):
    """LN(x + dropout(Linear(attention(x)))), as SASRec's layers begin (Kang and McAuley 2018, arXiv:1808.09781).

    Args:
        dim: length of a vector.
        heads: heads, which divide it.
        dropout: share of the output that is zeroed in training.
        attention_dropout: share of the attention that is zeroed in training.

    Raises:
        ValueError: the heads do not divide dim.
    """

    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"--encoder.heads: expected a divisor of the rows' length {dim}, got {heads}")
        self.dim, self.heads = dim, heads
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.project = nn.Linear(dim, 3 * dim)  # queries, keys and values, heads side by side in each
        self.output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map the vectors of all slots [S, dim] to others."""
        share = self.attention_dropout if self.training else 0.0
        kernels = jagged_attention if layout.buckets is None else bucketed_attention
        return self._finish(x, kernels.attend(self.project(x), layout, self.heads, share))

    def from_last(self, x: Tensor, last: Tensor, layout: Layout) -> Tensor:
        """Compute `forward` of each history's last item alone, [B, dim]; `last` are the items' rows of `x`.

        Keys and values are linear in x, so each query is mapped to where x is, instead of all of x to where the query
        is; and the weighted sum of x is mapped to a value, instead of all of x. With one query a history this leaves no
        product of all slots. The keys' bias adds the same to all scores of a query, so the softmax never sees it.
        """
        heads, width = self.heads, self.dim // self.heads
        to_query, to_key, to_value = self.project.weight.split(self.dim)
        query_bias, _, value_bias = self.project.bias.split(self.dim)
        queries = nn.functional.linear(last, to_query / math.sqrt(width), query_bias / math.sqrt(width))
        queries = queries.view(-1, heads, width).transpose(0, 1) @ to_key.view(heads, width, self.dim)
        share = self.attention_dropout if self.training else 0.0
        kernels = jagged_attention if layout.buckets is None else bucketed_attention
        sums, weights = kernels.attend_from_last(queries.transpose(0, 1), x, layout, share)
        values = sums.transpose(0, 1) @ to_value.view(heads, width, self.dim).mT
        context = values.transpose(0, 1) + weights[:, :, None] * value_bias.view(heads, width)
        return self._finish(last, context.reshape(-1, self.dim))

    def _finish(self, x: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.norm(x + dropout(self.output(context), self.dropout if self.training else 0.0))
        return out


class FeedForward(nn.Module):
    """LN(x + dropout(Linear(GELU(Linear(x))))), with which each layer ends.

    Args:
        dim: length of a vector.
        inner: width between the two linear layers.
        dropout: share of the output that is zeroed in training.
    """

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.widen = nn.Linear(dim, inner)
        self.narrow = nn.Linear(inner, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors [..., dim] to others, each by itself."""
        inner = torch.nn.functional.gelu(self.widen(x))
        out: Tensor = self.norm(x + dropout(self.narrow(inner), self.dropout if self.training else 0.0))
        return out
