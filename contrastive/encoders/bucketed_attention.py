"""Attention by torch's operators, bucket by bucket: on any device, in any precision, and with second derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from contrastive.encoders.attention_kernels import HIDDEN_SCORE
from contrastive.encoders.jagged import Bucket, Layout


def attend(projected: Tensor, layout: Layout, heads: int, dropout: float) -> Tensor:
    """Causal attention of each slot to those of its history up to itself.

    Args:
        projected: [S, 3 * dim], queries, keys and values.
        layout: Whose slots these are, with buckets.
        heads: Heads, which divide dim.
        dropout: Share of the attention that is zeroed; 0 in evaluation.

    Returns:
        [S, dim], the heads side by side.
    """
    assert layout.buckets is not None
    dim = projected.shape[1] // 3
    contexts: list[Tensor] = []
    sizes = [bucket.count * bucket.width for bucket in layout.buckets]
    for bucket, slots in zip(layout.buckets, projected.split(sizes), strict=True):
        split = slots.view(bucket.count, bucket.width, 3, heads, dim // heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = queries @ keys.mT / math.sqrt(dim // heads) + _mask(bucket, scores_of=projected)
        context = functional.dropout(scores.softmax(-1), dropout) @ values
        contexts.append(context.transpose(1, 2).reshape(-1, dim))
    return torch.cat(contexts)


def attend_from_last(queries: Tensor, vectors: Tensor, layout: Layout, dropout: float) -> tuple[Tensor, Tensor]:
    """Attention of queries, one a history and head, to the history's vectors themselves.

    Args:
        queries: [B, heads, dim], scaled.
        vectors: [S, dim], keys and values at once.
        layout: Whose slots these are, with buckets.
        dropout: Share of the attention that is zeroed; 0 in evaluation.

    Returns:
        The weighted sums [B, heads, dim], and the sums of the weights [B, heads], which dropout moves away from 1.
    """
    assert layout.buckets is not None
    sums: list[Tensor] = []
    weights: list[Tensor] = []
    counts = [bucket.count for bucket in layout.buckets]
    sizes = [bucket.count * bucket.width for bucket in layout.buckets]
    for bucket, asking, slots in zip(layout.buckets, queries.split(counts), vectors.split(sizes), strict=True):
        keys = slots.view(bucket.count, bucket.width, -1)
        scores = asking @ keys.mT + _last_mask(bucket, scores_of=vectors)
        attention = functional.dropout(scores.softmax(-1), dropout)
        sums.append(attention @ keys)
        weights.append(attention.sum(-1))
    return torch.cat(sums), torch.cat(weights)


def _mask(bucket: Bucket, scores_of: Tensor) -> Tensor:
    """What is added to the scores: [w, w], or [b, 1, w, w] where something is hidden."""
    ahead = scores_of.new_full((bucket.width, bucket.width), -math.inf).triu(1)
    return ahead if bucket.hidden is None else _hide(bucket, ahead)[:, None]


def _last_mask(bucket: Bucket, scores_of: Tensor) -> Tensor:
    """[b, 1, w]."""
    slots = torch.arange(bucket.width, device=scores_of.device)
    ahead = scores_of.new_zeros(()).where(slots <= bucket.last[:, None], -math.inf)[:, None]
    return ahead if bucket.hidden is None else _hide(bucket, ahead)


def _hide(bucket: Bucket, ahead: Tensor) -> Tensor:
    assert bucket.hidden is not None
    assert bucket.unmasked is not None
    mask = ahead + bucket.hidden[:, None].to(ahead.dtype) * float(HIDDEN_SCORE)
    return mask.masked_fill(bucket.unmasked[:, None, None], 0)
