"""The rows of a plan, of which this process holds a part: bags are looked up and updated wherever their rows lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.kernels import exchange_kernels
from embeddings.kernels.threads import run_all
from embeddings.local.local_rows import Bags, LocalRows
from embeddings.sharded.id_exchange import IdExchange, Request
from embeddings.sharded.lanes import lay_lanes
from embeddings.sharded.node_memory import share_memory, span_memory
from embeddings.sharded.replicated_rows import ReplicatedRows
from embeddings.sharded.vector_exchange import NetworkExchange, Places, VectorExchange
from embeddings.sharded.whole_sums import RankSums
from embeddings.shards import Exchange, ShardingPlan
from embeddings.stopwatch import Stopwatch
from embeddings.tables import TableConfig

Booleans = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """What backward needs of a look-up.

    Attributes:
        request: Which bags asked for what.
        places: Where vectors lie that are exchanged.
        is_direct: [lanes]: whether a lane's vectors lie in ``out`` instead: this rank holds the rows that it asks for,
            and a cell is all that its bag has of them.
        owned: The cells that all ranks ask of this one.
    """

    request: Request
    places: Places
    is_direct: Booleans
    owned: Bags


class ShardedRows:
    """The rectangles of tables that this rank holds, and the exchange with those that hold the others.

    Who asks cuts its ids by row range. Who holds the rows sums each cell's rows, straight into what it sends back,
    and who asked adds up each bag's cells. Only cells travel: a row-wise table with one id per bag costs about as many
    bytes as one that lies on one rank. All ranks call the same methods in the same order.

    Rows of a table that lies on several ranks of one node are summed where they are asked for, not on their node:
    with many ids per bag, and several nodes, more bytes cross between nodes than would have to.

    Args:
        configs: The tables.
        plan: What lies on which rank of the default group.
        seed: See ``build_tables``.
        exchange: Type in which vectors and gradients travel.

    Raises:
        ValueError: When the plan is not one of these tables, or of the running group.
    """

    def __init__(
        self, configs: Sequence[TableConfig], plan: ShardingPlan, *, seed: int = 0, exchange: Exchange = "fp32"
    ) -> None:
        _check_group(plan)
        self._configs, self._rank = configs, dist.get_rank()
        self._lanes = lanes = lay_lanes(configs, plan)
        self._mine = slice(lanes.owners[self._rank], lanes.owners[self._rank + 1])
        self._tables = lanes.tables[self._rank]
        self._rows = LocalRows(lanes.parts[self._rank], seed=seed)
        features = itertools.count()
        features_of = [[next(features) for _ in config.features] for config in configs]
        self._replicated = ReplicatedRows(
            [configs[t] for t in lanes.replicated],
            [features_of[t] for t in lanes.replicated],
            seed=seed,
            is_primary=self._rank == 0,
        )
        self._ids = IdExchange(lanes, self._rank)
        # Sixteen bits are for networks; memory takes a number as it is.
        shared = share_memory(lanes, self._rank) if exchange == "fp32" and plan.ranks_per_node == plan.ranks else None
        self._vectors: VectorExchange = shared or NetworkExchange(lanes, self._rank, exchange)
        self._sums = RankSums(lanes, self._rank)
        tables = [config for config in configs for _ in config.features]
        self._num_rows = np.array([config.num_rows for config in tables], dtype=np.int64)
        self._dims = np.array([config.dim for config in tables], dtype=np.int64)
        self._means = np.array([config.pooling == "mean" for config in tables])
        self._by_feature = np.lexsort((lanes.column, lanes.cut))
        columns = (lanes.feature, lanes.cut, lanes.column, lanes.width)
        self._placed = np.ascontiguousarray(np.stack(columns, axis=1)[self._by_feature])
        self.bytes_sent = {"ids": 0, "rows": 0, "gradients": 0, "sums": 0}

    def begin(self, asked: Bags, stopwatch: Stopwatch) -> Request:
        """Begins to send ids (a collective call).

        Args:
            asked: The bags of this rank: one segment per feature, in order, with the feature as PART.
            stopwatch: Of whoever measures.
        """
        with stopwatch.stage("ids all-to-all"):
            batch = (asked.ids.numpy(), asked.offsets.numpy(), asked.segments)
            request = self._ids.begin(asked, wrong=exchange_kernels.find_outside(*batch, self._num_rows))
        self.bytes_sent["ids"] += request.num_bytes
        return request

    def look_up(self, request: Request, out: Tensor, stopwatch: Stopwatch) -> LookedUp:
        """Pools the bags of a request, of which no rank was wrong, into ``out``, flat float32 (a collective call)."""
        with stopwatch.stage("ids all-to-all"):
            ids, offsets, weights = self._ids.finish(request)
        with stopwatch.stage("lookup"):
            asked_of = request.asked_of[:, :, 0]
            places = self._vectors.lay(request.cells.num_cells, asked_of, request.asked_from)
            is_direct = self._find_direct(request)
            segments = self._segments(request, places, is_direct)
            owned = Bags(ids=ids, offsets=offsets, weights=weights, segments=segments)
            looked_up = LookedUp(request=request, places=places, is_direct=is_direct, owned=owned)
            vectors = self._vectors.open(places)
            self._rows.look_up(*self._join(looked_up, vectors, out))
        with stopwatch.stage("rows all-to-all"):
            self.bytes_sent["rows"] += self._vectors.send_vectors(vectors, places)
        with stopwatch.stage("lookup"):
            self._place(looked_up, vectors, out)
            self._replicated.look_up(request.asked, out)
        return looked_up

    def update(self, looked_up: LookedUp, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """Updates the rows of a look-up by the gradient of its ``out``, wherever they lie (a collective call)."""
        request, places = looked_up.request, looked_up.places
        with stopwatch.stage("row update"):
            vectors = self._vectors.open(places)
            summing = self._replicated.begin_update(request.asked, gradient)
            self._gather(looked_up, gradient, vectors)
        with stopwatch.stage("gradients all-to-all"):
            self.bytes_sent["gradients"] += self._vectors.send_gradients(vectors, places)
        before = self._sums.num_bytes
        with stopwatch.stage("row update"):
            self._rows.update(*self._join(looked_up, vectors, gradient), self._sums if self._sums.rounds else None)
        self.bytes_sent["sums"] += self._sums.num_bytes - before
        with stopwatch.stage("gradients all-to-all"):
            if summing is not None:
                summing.wait()
                self.bytes_sent["gradients"] += self._replicated.num_bytes
        with stopwatch.stage("row update"):
            self._replicated.finish_update(summing)

    def rows(self) -> Iterator[TableRows]:
        """Gives the live rows that this rank holds, in the order of tables."""
        own = [(t, rows) for t, rows in zip(self._tables, self._rows.rows(), strict=True)]
        own += zip(self._lanes.replicated, self._replicated.rows(), strict=True)
        for t, rows in sorted(own, key=lambda pair: pair[0]):
            yield rows._replace(config=self._configs[t])

    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """See ``Tables``."""
        self._rows.set_learning_rate_factors([factors[t] for t in self._tables])
        self._replicated.set_learning_rate_factors([factors[t] for t in self._lanes.replicated])

    def set_eps_factor(self, factor: float) -> None:
        """See ``Tables``."""
        self._rows.set_eps_factor(factor)
        self._replicated.set_eps_factor(factor)

    def _find_filled(self, request: Request) -> Booleans:
        """Returns [features]: whether each bag has one cell; replicated tables have none."""
        cuts = self._lanes.feature_cuts
        single = np.diff(cuts) == 1
        filled = np.zeros(len(single), np.bool_)
        filled[single] = request.cells.num_cells[cuts[:-1][single]] == request.asked.segments[single, 2]
        return filled

    def _find_direct(self, request: Request) -> Booleans:
        """See ``LookedUp``. Means are taken where vectors are copied."""
        feature = self._lanes.feature
        whole = self._find_filled(request) & ~self._means & (request.asked.segments[:, 2] > 0)
        found: Booleans = whole[feature] & (self._lanes.owner == self._rank)
        return found

    def _segments(self, request: Request, places: Places, is_direct: Booleans) -> Any:
        lanes, asked_of = self._lanes, request.asked_of[:, :, 0]
        mine, direct = self._mine, is_direct[self._mine]
        part, width = (np.broadcast_to(of[mine], asked_of.shape) for of in (lanes.part, lanes.width))
        first = (np.cumsum(asked_of) - asked_of.ravel()).reshape(asked_of.shape)
        start, stride = places.asked_starts.copy(), width.copy()
        bags = request.asked.segments[lanes.feature[mine][direct]]
        start[self._rank, direct] = bags[:, 3] + lanes.column[mine][direct]
        stride[self._rank, direct] = bags[:, 4]
        columns = (part, first, asked_of, start, stride)
        # By lane, which is by part and feature, and then by rank: gradients are summed in the order of the samples.
        return np.stack([column.T.ravel() for column in columns], axis=1)

    def _join(self, looked_up: LookedUp, vectors: Tensor, asked: Tensor) -> tuple[Bags, Tensor]:
        """Makes one flat tensor of vectors that are exchanged and those in ``asked``, with the cells placed in it."""
        owned, direct = looked_up.owned, looked_up.is_direct[self._mine]
        if not direct.any():
            return owned, vectors
        flat, first_exchanged, first_asked = span_memory(vectors.numpy(), asked.view(-1).numpy())
        firsts = np.full((direct.size, self._lanes.ranks), first_exchanged)
        firsts[direct, self._rank] = first_asked
        segments = owned.segments.copy()
        segments[:, 3] += firsts.ravel()
        return replace(owned, segments=segments), torch.from_numpy(flat)

    def _place(self, looked_up: LookedUp, vectors: Tensor, out: Tensor) -> None:
        asked = looked_up.request.asked
        filled = self._find_filled(looked_up.request) | (np.diff(self._lanes.feature_cuts) == 0)
        shared = (asked.offsets.numpy(), asked.segments, filled, self._dims, self._means)
        self._over_bags(exchange_kernels.place_vectors, looked_up, vectors.numpy(), shared, out.view(-1).numpy())

    def _gather(self, looked_up: LookedUp, gradient: Tensor, vectors: Tensor) -> None:
        asked = looked_up.request.asked
        shared = (asked.offsets.numpy(), asked.segments, self._means)
        self._over_bags(
            exchange_kernels.gather_gradients, looked_up, gradient.view(-1).numpy(), shared, vectors.numpy()
        )

    def _over_bags(self, kernel: Any, looked_up: LookedUp, source: Any, shared: tuple[Any, ...], target: Any) -> None:
        cells, threads = looked_up.request.cells, torch.get_num_threads()
        bags = int(looked_up.request.asked.segments[:, 2].max(initial=0))
        copied = ~looked_up.is_direct[self._by_feature]
        starts = looked_up.places.starts[self._by_feature][copied]
        where = (source, starts, self._placed[copied], cells.bags, cells.first_cell, cells.num_cells)
        edges = [bags * part // threads for part in range(threads + 1)]
        run_all([partial(kernel, *where, *shared, *edge, target) for edge in itertools.pairwise(edges)])


def _check_group(plan: ShardingPlan) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"plan: expected torch.distributed's default group of {plan.ranks} ranks to run, it does not; start "
            "the program with torchrun, or call torch.distributed.init_process_group"
        )
    if dist.get_world_size() != plan.ranks:
        raise ValueError(
            f"plan: expected as many ranks as run, {dist.get_world_size()}, got a plan of {plan.ranks}; make one for "
            f"{dist.get_world_size()}, or start {plan.ranks} ranks"
        )
