"""Norms of each sample's gradient of tables, and of their sum, from the gradient of the pooled rows.

A row's gradient is the gradient of the bag it was pooled into, times the id's weight and, of a mean, 1 / ids of the
bag. So what one sample does to a table has the squared norm (sum over its distinct ids of multiplicity^2) *
|d loss / d pooled|^2; where several features of a sample share a table, ids that they have in common add up first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dlrm.noise.frequency_bands import TableBands
from embeddings.jagged import Jagged


class TableSquares(NamedTuple):
    """Of one table, by frequency band; of tables without bands there is one.

    Attributes:
        squares: [bands] float64, sum over samples of |g_i|^2.
        squared_sums: [bands] float64, |sum_i g_i|^2.
    """

    squares: Tensor
    squared_sums: Tensor


class Vectors(NamedTuple):
    """The gradients of some features' pooled rows.

    Attributes:
        vectors: [m, dim].
        norms: [m], squared.
        firsts: of each feature, where the vector of its first sample is.
        step: from one sample's vector to the next one's.
    """

    vectors: Tensor
    norms: Tensor
    firsts: list[int]
    step: int


class Entries(NamedTuple):
    """What samples do to rows: entry e adds `scales[e] * source.vectors[places[e]]` to the gradient of row `rows[e]`.

    They are sorted by row, and within a row by sample.

    Attributes:
        rows: [n] int64.
        samples: [n] int64, whose ids they are.
        places: [n] int64.
        scales: [n] float32, None where all are 1.
        source: of the vectors.
        is_single: whether no sample has two.
        has_one_vector: whether all entries of a sample have the same place.
    """

    rows: Tensor
    samples: Tensor
    places: Tensor
    scales: Tensor | None
    source: Vectors
    is_single: bool
    has_one_vector: bool


class PooledGradient:
    """The gradient of all features' pooled rows.

    Args:
        delta: [B, sum(dims)].
        dims: of the features.
    """

    def __init__(self, delta: Tensor, dims: Sequence[int]) -> None:
        self._delta, self._dims = delta.contiguous(), dims
        self._starts = [0, *accumulate(dims)]
        self._all: Vectors | None = None
        if len(set(dims)) == 1:  # as in most models: nothing needs to be copied
            vectors = self._delta.view(-1, dims[0])
            self._all = Vectors(vectors, _squared_norms(vectors), list(range(len(dims))), len(dims))

    def of(self, features: Sequence[int]) -> Vectors:
        """Return those of features that are equally long."""
        if self._all is not None:
            return self._all._replace(firsts=[self._all.firsts[feature] for feature in features])
        vectors = torch.cat([self._delta[:, self._starts[f] : self._starts[f + 1]] for f in features])
        firsts = [number * len(self._delta) for number in range(len(features))]
        return Vectors(vectors, _squared_norms(vectors), firsts, 1)


def find_entries(batch: Jagged, features: Sequence[int], source: Vectors, *, mean: bool) -> Entries:
    """Return what a batch does to one table.

    Args:
        batch: as tables read it.
        features: of the table, by number.
        source: the gradients of their pooled rows.
        mean: whether bags are means.
    """
    size, device = batch.batch_size, source.vectors.device
    every_row, every_sample, places, scales, is_single = [], [], [], [], len(features) == 1
    for feature, first in zip(features, source.firsts, strict=True):
        cells = batch.positions[feature] * size
        bounds = batch.offsets[cells : cells + size + 1]
        lengths, begin = bounds.diff(), int(bounds[0])
        owners = torch.arange(size, device=device).repeat_interleave(lengths)
        ids = slice(begin, begin + len(owners))
        is_single = is_single and (len(owners) <= size and bool((lengths <= 1).all()))
        every_row.append(batch.ids[ids].long())
        every_sample.append(owners)
        places.append(owners * source.step + first)
        weights = source.norms.new_ones(len(owners)) if batch.weights is None else batch.weights[ids]
        scales.append(weights / lengths[owners] if mean else weights)
    is_plain = batch.weights is None and (is_single or not mean)
    is_alone = len(features) == 1
    # Samples ascend already where there is but one feature, and a stable sort leaves them so.
    rows, samples = torch.cat(every_row), torch.cat(every_sample)
    order = torch.sort(rows if is_alone else rows * size + samples, stable=True).indices
    return Entries(
        rows=rows[order],
        samples=samples[order],
        places=torch.cat(places)[order],
        scales=None if is_plain else torch.cat(scales)[order],
        source=source,
        is_single=is_single,
        has_one_vector=is_alone,
    )


def measure_entries(entries: Entries, bands: TableBands) -> TableSquares:
    """Return the sums over samples and rows.

    Args:
        entries: what the batch does to the table.
        bands: of the table's rows.
    """
    new_row = _changes(entries.rows)
    new_pair = new_row | _changes(entries.samples)
    first_of_row, first_of_pair = new_row.nonzero().squeeze(1), new_pair.nonzero().squeeze(1)
    of_rows = _norms_of_sums(entries, first_of_row)
    if entries.is_single:
        own = entries.source.norms[entries.places]
        own = own if entries.scales is None else own * entries.scales.square()
    elif entries.has_one_vector:
        own = entries.source.norms[entries.places[first_of_pair]] * _sum_scales(entries, new_pair).square()
    else:
        own = _norms_of_sums(entries, first_of_pair)
    return TableSquares(bands.sum(entries.rows[first_of_pair], own), bands.sum(entries.rows[first_of_row], of_rows))


def _changes(numbers: Tensor) -> Tensor:
    """Return where a number differs from the one before."""
    differs = torch.ones_like(numbers, dtype=torch.bool)
    differs[1:] = numbers[1:] != numbers[:-1]
    return differs


def _norms_of_sums(entries: Entries, firsts: Tensor) -> Tensor:
    """Return the squared norm of the sum of the entries from each of `firsts` to the next one."""
    # As a look-up that pools: it adds up vectors where they lie, without a copy of each.
    vectors, scales = entries.source.vectors, entries.scales
    return _squared_norms(embedding_bag(entries.places, vectors, firsts, mode="sum", per_sample_weights=scales))


def _sum_scales(entries: Entries, is_first: Tensor) -> Tensor:
    """Return the sum of the scales from each first entry to the next one."""
    number = is_first.long().cumsum(0) - 1
    if entries.scales is None:
        return torch.bincount(number).float()
    return entries.scales.new_zeros(int(is_first.sum())).index_add_(0, number, entries.scales)


def _squared_norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms.square()
