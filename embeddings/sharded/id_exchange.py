"""Sends each rank's ids to the ranks that hold their rows: one all-to-all of sizes, and one of everything else.

A message holds, for all lanes of one rank that asks another: the ids, relative to the rows that they are among, 4 bytes
each (8 where a rectangle of the plan has more than 2**31 rows); their weights, if there are any, 4 bytes each; and for
each lane in which some cell has more than one id, its cells' numbers of ids, 4 bytes each. Its header, 8 bytes times
2 + 2 * lanes, says how many cells and ids each lane has, and for how many numbers other ranks are asked before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from embeddings.kernels import exchange_kernels
from embeddings.local.local_rows import Bags
from embeddings.sharded.lanes import Lanes

Longs = NDArray[np.int64]

_HAS_WEIGHTS, _IS_WRONG = 1, 2  # bits of a header's first number
_MOST_NARROW = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What this rank's bags have in each cut.

    Attributes:
        bags: [cells] int32: the bag, counted within its feature, cut by cut.
        num_cells, first_cell, num_ids: [cuts].
    """

    bags: NDArray[np.int32]
    num_cells: Longs
    first_cell: Longs
    num_ids: Longs


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch's ids on their way.

    Attributes:
        asked: The bags of this rank, with features as PART.
        cells: They, cut.
        asked_of: [ranks, lanes of this rank, 2]: cells and ids that each rank asks for.
        asked_from: [ranks]: how many numbers each rank asks for of the ranks before this one.
        has_weights: By rank.
        wrong: The place of an id outside its table in this rank's batch, or -1.
        wrong_ranks: Those whose batch has one; nothing has been sent then.
        own: What this rank asks of itself.
        received: The other ranks' messages, in their order.
        sizes: Of these, in words; 0 for this rank.
        work: What to wait for.
        num_bytes: What left this process.
    """

    asked: Bags
    cells: Cells
    asked_of: Longs
    asked_from: Longs
    has_weights: list[bool]
    wrong: int
    wrong_ranks: list[int]
    own: Tensor
    received: Tensor
    sizes: list[int]
    work: Any
    num_bytes: int


class IdExchange:
    """The ids' all-to-all of one rank.

    Args:
        lanes: Of the plan.
        rank: This rank.
    """

    def __init__(self, lanes: Lanes, rank: int) -> None:
        self.lanes, self.rank = lanes, rank
        rows = lanes.cut_rows[:, 1] - lanes.cut_rows[:, 0]
        self._words_per_id = 2 if (rows > _MOST_NARROW).any() else 1
        self._cuts_of = [lanes.cut[lanes.owners[r] : lanes.owners[r + 1]] for r in range(lanes.ranks)]
        self._own_lanes = len(self._cuts_of[rank])

    def begin(self, asked: Bags, *, wrong: int = -1) -> Request:
        """Cuts a batch's ids and begins to send them (a collective call).

        Args:
            asked: This rank's bags, with features as PART.
            wrong: The place of an id outside its table, or -1; then this rank asks for nothing, and all know.
        """
        is_wrong = wrong >= 0
        if is_wrong:
            asked = replace(asked, segments=asked.segments[:0])
        weighted = asked.weights is not None
        cells, rows, lengths, weights = self._cut(asked)
        headers, header_bytes = self._exchange_headers(cells, _HAS_WEIGHTS * weighted + _IS_WRONG * is_wrong)
        flags, asked_of = headers[:, 0].tolist(), headers[:, 2:].reshape(self.lanes.ranks, self._own_lanes, 2)
        has_weights = [bool(flag & _HAS_WEIGHTS) for flag in flags]
        wrong_ranks = [rank for rank, flag in enumerate(flags) if flag & _IS_WRONG]
        counts = np.stack([cells.num_cells, cells.num_ids], axis=1)
        words = [self._count_words(counts[cuts], weighted) for cuts in self._cuts_of]
        sizes = [self._count_words(of_rank, has) for of_rank, has in zip(asked_of, has_weights, strict=True)]
        own = torch.empty(words[self.rank], dtype=torch.int32)
        words[self.rank] = sizes[self.rank] = 0
        sent, received = torch.empty(sum(words), dtype=torch.int32), torch.empty(sum(sizes), dtype=torch.int32)
        messages = list(sent.split(words))
        messages[self.rank] = own
        first_id = np.cumsum(cells.num_ids) - cells.num_ids
        where = (cells.num_cells, cells.num_ids, cells.first_cell, first_id)
        for cuts, message in zip(self._cuts_of, messages, strict=True):
            exchange_kernels.pack(cuts, *where, lengths, rows, self._words_per_id, weights, message.numpy())
        work = None if wrong_ranks else dist.all_to_all_single(received, sent, sizes, words, async_op=True)
        return Request(
            asked=asked,
            cells=cells,
            asked_of=asked_of,
            asked_from=headers[:, 1],
            has_weights=has_weights,
            wrong=wrong,
            wrong_ranks=wrong_ranks,
            own=own,
            received=received,
            sizes=sizes,
            work=work,
            num_bytes=header_bytes + (0 if wrong_ranks else sent.nbytes),
        )

    def finish(self, request: Request) -> tuple[Tensor, Tensor, Tensor | None]:
        """Waits for the ids that all ranks ask of this one.

        Returns:
            ids, offsets and weights of the cells, as ``Bags`` has them: those of rank 0, lane by lane, first.
        """
        request.work.wait()
        num_cells = np.ascontiguousarray(request.asked_of[:, :, 0])
        num_ids = np.ascontiguousarray(request.asked_of[:, :, 1])
        total = int(num_ids.sum())
        ids = np.empty(total, np.int64 if self._words_per_id == 2 else np.int32)
        weights = np.empty(total if any(request.has_weights) else 0, np.float32)
        offsets = np.zeros(int(num_cells.sum()) + 1, np.int64)
        messages = list(request.received.split(request.sizes))
        messages[self.rank] = request.own
        first_id, first_cell = 0, 0
        for rank, message in enumerate(messages):
            cells = int(num_cells[rank].sum())
            exchange_kernels.unpack(
                message.numpy(),
                num_cells[rank],
                num_ids[rank],
                self._words_per_id,
                request.has_weights[rank],
                first_id,
                ids.view(np.int32),
                weights.view(np.int32),
                offsets[1 + first_cell : 1 + first_cell + cells],
            )
            first_cell += cells
            first_id += int(num_ids[rank].sum())
        return (
            torch.from_numpy(ids),
            torch.from_numpy(offsets),
            torch.from_numpy(weights) if any(request.has_weights) else None,
        )

    def _cut(self, asked: Bags) -> tuple[Cells, NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        cuts = len(self.lanes.cut_rows)
        num_cells, num_ids = np.zeros(cuts, np.int64), np.zeros(cuts, np.int64)
        weights = np.empty(0, np.float32) if asked.weights is None else asked.weights.numpy()
        batch = (asked.ids.numpy(), asked.offsets.numpy())
        where = (asked.segments, self.lanes.feature_cuts, self.lanes.cut_rows)
        exchange_kernels.count_cells(*batch, *where, num_cells, num_ids)
        first_cell, first_id = np.cumsum(num_cells) - num_cells, np.cumsum(num_ids) - num_ids
        bags, lengths = np.empty(num_cells.sum(), np.int32), np.empty(num_cells.sum(), np.int32)
        rows = np.empty(num_ids.sum(), np.int64 if self._words_per_id == 2 else np.int32)
        row_weights = np.empty(rows.size if weights.size else 0, np.float32)
        written = (bags, lengths, rows, row_weights)
        exchange_kernels.cut_ids(*batch, weights, *where, first_cell.copy(), first_id, *written)
        cells = Cells(bags=bags, num_cells=num_cells, first_cell=first_cell, num_ids=num_ids)
        return cells, rows.view(np.int32), lengths, row_weights.view(np.int32)

    def _exchange_headers(self, cells: Cells, flags: int) -> tuple[Longs, int]:
        numbers = cells.num_cells[self.lanes.cut] * self.lanes.width
        asked_before = np.concatenate([[0], np.cumsum(numbers)])[self.lanes.owners]
        leaving = []
        for cuts, before in zip(self._cuts_of, asked_before[:-1], strict=True):
            counts = np.stack([cells.num_cells[cuts], cells.num_ids[cuts]], axis=1)
            leaving.append(np.concatenate([[flags, before], counts.ravel()]))
        ranks, size = self.lanes.ranks, 2 + 2 * self._own_lanes
        arrived = torch.empty(ranks * size, dtype=torch.int64)
        sent = torch.from_numpy(np.concatenate(leaving))
        dist.all_to_all_single(arrived, sent, [size] * ranks, [header.size for header in leaving])
        num_bytes = sum(header.nbytes for rank, header in enumerate(leaving) if rank != self.rank)
        return arrived.view(ranks, size).numpy(), num_bytes

    def _count_words(self, counts: Longs, has_weights: bool) -> int:
        cells, ids = counts[:, 0], counts[:, 1]
        return int(ids.sum() * (self._words_per_id + has_weights) + cells[ids > cells].sum())
