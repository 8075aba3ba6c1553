"""Norms of each sample's gradient of tables, and of their sum, from the gradient of the pooled rows.

A row's gradient is the gradient of the bag it was pooled into, times the id's weight and, of a mean, 1 / ids of the
bag. So what one sample does to a table has the squared norm (sum over its distinct ids of multiplicity^2) *
|d loss / d pooled|^2; where several features of a sample share a table, ids that they have in common add up first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.hooks import RemovableHandle

from embeddings.interface import Tables
from embeddings.jagged import Jagged, read_jagged


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

    def sum_by(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the entries of equal keys [n]; return one entry's number of each key, and the sums [keys, dim]."""
        order, first = _group(keys)
        # As a look-up that pools: it adds up vectors where they lie, without a copy of each.
        scales = None if self.scales is None else self.scales[order]
        sums = embedding_bag(self.places[order], self.source.vectors, first, mode="sum", per_sample_weights=scales)
        return order[first], sums


@dataclass(eq=False)
class TablesRecorder:
    """Keeps, for one step, what tables were asked for and the gradient of what they gave.

    Attributes:
        tables: that give one vector per bag.
        edges: of each table by name, the first rows of its second, third, ... frequency band.
        calls: in this step; of more than one nothing is known.
    """

    tables: Tables
    edges: dict[str, tuple[int, ...]]
    calls: int = 0
    features: Any = None
    delta: Tensor | None = None
    handle: RemovableHandle | None = None

    def open(self) -> None:
        """Record the next step."""
        self.close()
        self.handle = self.tables.register_forward_hook(self._keep)

    def close(self) -> None:
        """Record no longer, and forget."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.calls, self.features, self.delta = None, 0, None, None

    @property
    def is_complete(self) -> bool:
        """Whether the step has told all that is needed."""
        return self.calls == 1 and self.delta is not None

    @torch.no_grad()
    def measure(self) -> list[TableSquares]:
        """Return the sums of every table, in the order of `table_configs`, of the loss that backward was called on."""
        assert self.delta is not None, "asked only where is_complete"
        tables, batch = self.tables, read_jagged(self.features, self.tables.feature_names)
        vectors = PooledGradient(self.delta, tables.feature_dims)
        found = []
        for number, config in enumerate(tables.table_configs):
            own = [feature for feature, table in enumerate(tables.feature_tables) if table == number]
            entries = find_entries(batch, own, vectors.of(own), mean=config.pooling == "mean")
            edges = torch.tensor(self.edges.get(config.name, ()), dtype=torch.int64, device=self.delta.device)
            found.append(measure_entries(entries, edges))
        return found

    def _keep(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = output.values()
        if not (module.training and isinstance(values, Tensor) and values.requires_grad):
            return
        self.calls, self.features = self.calls + 1, inputs[0]
        values.register_hook(self._keep_delta)

    def _keep_delta(self, gradient: Tensor) -> None:
        self.delta = gradient.detach().float()


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
    rows, samples, places, scales, is_single = [], [], [], [], len(features) == 1
    for feature, first in zip(features, source.firsts, strict=True):
        cells = batch.positions[feature] * size
        bounds = batch.offsets[cells : cells + size + 1]
        lengths, begin = bounds.diff(), int(bounds[0])
        owners = torch.arange(size, device=device).repeat_interleave(lengths)
        ids = slice(begin, begin + len(owners))
        is_single = is_single and (len(owners) <= size and bool((lengths <= 1).all()))
        rows.append(batch.ids[ids].long())
        samples.append(owners)
        places.append(owners * source.step + first)
        weights = source.norms.new_ones(len(owners)) if batch.weights is None else batch.weights[ids]
        scales.append(weights / lengths[owners] if mean else weights)
    is_plain = batch.weights is None and (is_single or not mean)
    return Entries(
        rows=torch.cat(rows),
        samples=torch.cat(samples),
        places=torch.cat(places),
        scales=None if is_plain else torch.cat(scales),
        source=source,
        is_single=is_single,
        has_one_vector=len(features) == 1,
    )


def measure_entries(entries: Entries, edges: Tensor) -> TableSquares:
    """Return the sums over samples and rows.

    Args:
        entries: what the batch does to the table.
        edges: first rows of all frequency bands but the first, ascending.
    """
    rows, own = _squares_of_samples(entries)
    by_row, sums = entries.sum_by(entries.rows)
    return TableSquares(_sum_by_band(rows, own, edges), _sum_by_band(entries.rows[by_row], _squared_norms(sums), edges))


def _squares_of_samples(entries: Entries) -> tuple[Tensor, Tensor]:
    """Return (row, squared norm) of what each sample does to each of its rows."""
    if not entries.has_one_vector:
        some, sums = entries.sum_by(_pair(entries))
        return entries.rows[some], _squared_norms(sums)
    norms = entries.source.norms
    scales = torch.ones_like(entries.rows, dtype=norms.dtype) if entries.scales is None else entries.scales
    if entries.is_single:
        return entries.rows, norms[entries.places] * scales.square()
    order, first = _group(_pair(entries))
    number = torch.zeros_like(order).index_fill_(0, first, 1).cumsum(0) - 1
    totals = torch.zeros_like(first, dtype=norms.dtype).index_add_(0, number, scales[order])
    some = order[first]
    return entries.rows[some], norms[entries.places[some]] * totals.square()


def _pair(entries: Entries) -> Tensor:
    """Return a number for each entry that tells its sample and its row."""
    return entries.samples * (entries.rows.max() + 1 if len(entries.rows) else 1) + entries.rows


def _group(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order that sorts keys, and where in it each different key begins."""
    ordered, order = torch.sort(keys)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return order, is_first.nonzero().squeeze(1)


def _squared_norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms.square()


def _sum_by_band(rows: Tensor, numbers: Tensor, edges: Tensor) -> Tensor:
    if not len(edges):
        return numbers.sum(dtype=torch.float64).unsqueeze(0)
    bands = torch.bucketize(rows, edges, right=True)
    return torch.bincount(bands, weights=numbers.double(), minlength=len(edges) + 1)
