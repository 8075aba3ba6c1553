"""The rows of a plan, of which this process holds a part: bags are looked up and updated wherever their rows lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.interface import TableRows
from embeddings.kernels import exchange_kernels
from embeddings.kernels.threads import run_all
from embeddings.local.local_rows import Bags, LocalRows
from embeddings.sharded.id_exchange import IdExchange, Request
from embeddings.sharded.lanes import lay_lanes
from embeddings.sharded.node_memory import share_memory
from embeddings.sharded.replicated_rows import ReplicatedRows
from embeddings.sharded.vector_exchange import Exchange, NetworkExchange, Places, VectorExchange
from embeddings.sharded.whole_sums import RankSums
from embeddings.shards import ShardingPlan
from embeddings.stopwatch import Stopwatch
from embeddings.tables import TableConfig


@dataclass(frozen=True, kw_only=True)
class LookedUp:
    """What backward needs of a look-up.

    Attributes:
        request: Which bags asked for what.
        owned: The cells that all ranks ask of this one.
        places: Where their vectors lie, and those that this rank asks for.
    """

    request: Request
    owned: Bags
    places: Places


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

    over_ranks = True

    def __init__(
        self, configs: Sequence[TableConfig], plan: ShardingPlan, *, seed: int = 0, exchange: Exchange = "fp32"
    ) -> None:
        _check_group(plan)
        self._configs, self._rank = configs, dist.get_rank()
        self._lanes = lanes = lay_lanes(configs, plan)
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

    def find_outside(self, asked: Bags) -> int:
        """Returns -1, or the place in ``asked.ids`` of the first id outside its table."""
        found: int = exchange_kernels.find_outside(
            asked.ids.numpy(), asked.offsets.numpy(), asked.segments, self._num_rows
        )
        return found

    def begin(self, asked: Bags, *, is_wrong: bool, stopwatch: Stopwatch) -> Request:
        """Begins to send ids (a collective call).

        Args:
            asked: The bags of this rank: one segment per feature, in order, with the feature as PART.
            is_wrong: Whether an id lies outside its table.
            stopwatch: Of whoever measures.
        """
        with stopwatch.stage("ids all-to-all"):
            request = self._ids.begin(asked, is_wrong=is_wrong)
        self.bytes_sent["ids"] += request.num_bytes
        return request

    def look_up(self, request: Request, out: Tensor, stopwatch: Stopwatch) -> LookedUp:
        """Pools the bags of a request, of which no rank was wrong, into ``out``, flat float32 (a collective call)."""
        with stopwatch.stage("ids all-to-all"):
            ids, offsets, weights = self._ids.finish(request)
        with stopwatch.stage("lookup"):
            asked_of = request.asked_of[:, :, 0]
            places = self._vectors.lay(request.cells.num_cells, asked_of, request.asked_from)
            segments = self._segments(asked_of, places)
            owned = Bags(ids=ids, offsets=offsets, weights=weights, segments=segments)
            vectors = self._vectors.open(places)
            self._rows.look_up(owned, vectors)
        with stopwatch.stage("rows all-to-all"):
            self.bytes_sent["rows"] += self._vectors.send_vectors(vectors, places)
        with stopwatch.stage("lookup"):
            self._place(request, places, vectors, out)
            self._replicated.look_up(request.asked, out)
        return LookedUp(request=request, owned=owned, places=places)

    def update(self, looked_up: LookedUp, gradient: Tensor, stopwatch: Stopwatch) -> None:
        """Updates the rows of a look-up by the gradient of its ``out``, wherever they lie (a collective call)."""
        request, places = looked_up.request, looked_up.places
        with stopwatch.stage("row update"):
            vectors = self._vectors.open(places)
            summing = self._replicated.begin_update(request.asked, gradient)
            self._gather(request, places, gradient, vectors)
        with stopwatch.stage("gradients all-to-all"):
            self.bytes_sent["gradients"] += self._vectors.send_gradients(vectors, places)
        before = self._sums.num_bytes
        with stopwatch.stage("row update"):
            self._rows.update(looked_up.owned, vectors, self._sums if self._sums.rounds else None)
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

    def set_learning_rate_factor(self, factor: float) -> None:
        """See ``Tables``."""
        self._rows.set_learning_rate_factor(factor)
        self._replicated.set_learning_rate_factor(factor)

    def _segments(self, asked_of: Any, places: Places) -> Any:
        mine = slice(self._lanes.owners[self._rank], self._lanes.owners[self._rank + 1])
        part, width = (np.broadcast_to(of[mine], asked_of.shape) for of in (self._lanes.part, self._lanes.width))
        first = (np.cumsum(asked_of) - asked_of.ravel()).reshape(asked_of.shape)
        columns = (part, first, asked_of, places.asked_starts, width)
        # By lane, which is by part and feature, and then by rank: gradients are summed in the order of the samples.
        return np.stack([column.T.ravel() for column in columns], axis=1)

    def _place(self, request: Request, places: Places, vectors: Tensor, out: Tensor) -> None:
        asked, cells, cuts = request.asked, request.cells, self._lanes.feature_cuts
        fills = np.diff(cuts) == 0  # replicated ones are none of ours
        single = np.diff(cuts) == 1
        fills[single] = cells.num_cells[cuts[:-1][single]] == asked.segments[single, 2]
        shared = (asked.offsets.numpy(), asked.segments, fills, self._dims, self._means)
        self._over_bags(exchange_kernels.place_vectors, request, places, vectors.numpy(), shared, out.view(-1).numpy())

    def _gather(self, request: Request, places: Places, gradient: Tensor, vectors: Tensor) -> None:
        shared = (request.asked.offsets.numpy(), request.asked.segments, self._means)
        self._over_bags(
            exchange_kernels.gather_gradients, request, places, gradient.view(-1).numpy(), shared, vectors.numpy()
        )

    def _over_bags(
        self, kernel: Any, request: Request, places: Places, source: Any, shared: tuple[Any, ...], target: Any
    ) -> None:
        cells, threads = request.cells, torch.get_num_threads()
        bags = int(request.asked.segments[:, 2].max(initial=0))
        where = (source, places.starts[self._by_feature], self._placed, cells.bags, cells.first_cell, cells.num_cells)
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
