"""Sums over the shards of a table that row optimizers need where a table is split over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.local.local_rows import RowsPart, rounds_needed
from embeddings.row_optimizers import trust_of
from embeddings.sharded.lanes import Lanes

_MOST_SUMS = 2  # a row's two norms


class RankSums:
    """``WholeSums`` over the ranks of the default group, for one rank.

    Partial sums of a row are added in the order of columns on every rank that holds some of them, so that all get the
    same bits; what is summed over a table goes through one all-reduce.

    Args:
        lanes: Of the plan.
        rank: This rank.
    """

    def __init__(self, lanes: Lanes, rank: int) -> None:
        self.rounds = max(
            (
                rounds_needed(part.config.optimizer)
                for parts in lanes.parts
                for part in parts
                if part.num_columns < part.config.dim or _shares_ratio(part)
            ),
            default=0,
        )
        self.num_bytes = 0  # what has left this process
        self._rank, self._ranks = rank, lanes.ranks
        self._groups = [group for group in _groups(lanes) if any(r == rank for r, _ in group)]
        self._table_of = lanes.tables[rank]
        split = {
            table
            for parts, tables in zip(lanes.parts, lanes.tables, strict=True)
            for part, table in zip(parts, tables, strict=True)
            if _shares_ratio(part)
        }
        self._places = {table: place for place, table in enumerate(sorted(split))}

    def exchange(
        self, round: int, over_columns: dict[int, Tensor], over_table: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Adds up partial sums of the shards of each table (a collective call); see ``WholeSums``."""
        return self._over_columns(over_columns), self._over_table(over_table)

    def _over_columns(self, own: dict[int, Tensor]) -> dict[int, Tensor]:
        groups = [group for group in self._groups if any(r == self._rank and part in own for r, part in group)]
        leaving: list[list[Tensor]] = [[] for _ in range(self._ranks)]
        arriving = [0] * self._ranks
        for group in groups:
            mine = [own[part] for r, part in group if r == self._rank]
            for other in {r for r, _ in group} - {self._rank}:
                leaving[other] += [sums.reshape(-1) for sums in mine]
                arriving[other] += sum(r == other for r, _ in group) * mine[0].numel()
        sizes = [sum(map(len, sums)) for sums in leaving]
        sent = torch.cat([torch.empty(0, dtype=torch.float64), *(sums for of_rank in leaving for sums in of_rank)])
        received = torch.empty(sum(arriving), dtype=torch.float64)
        dist.all_to_all_single(received, sent, arriving, sizes)
        self.num_bytes += sent.nbytes
        return self._add(groups, own, list(received.split(arriving)))

    def _add(
        self, groups: Sequence[Sequence[tuple[int, int]]], own: dict[int, Tensor], messages: list[Tensor]
    ) -> dict[int, Tensor]:
        totals: dict[int, Tensor] = {}
        for group in groups:
            shape = next(own[part] for r, part in group if r == self._rank).shape
            total = torch.zeros(shape, dtype=torch.float64)
            for r, part in group:
                if r == self._rank:
                    total += own[part]
                else:
                    total += messages[r][: total.numel()].view(shape)
                    messages[r] = messages[r][total.numel() :]
            totals |= {part: total for r, part in group if r == self._rank}
        return totals

    def _over_table(self, own: dict[int, Tensor]) -> dict[int, Tensor]:
        if not self._places:
            return {}
        packed = torch.zeros(len(self._places), _MOST_SUMS, dtype=torch.float64)
        for part, sums in own.items():
            packed[self._places[self._table_of[part]], : len(sums)] += sums
        dist.all_reduce(packed)
        self.num_bytes += packed.nbytes
        return {part: packed[self._places[self._table_of[part]], : len(sums)] for part, sums in own.items()}


def _shares_ratio(part: RowsPart) -> bool:
    """Whether one ratio holds for many rows of a table that lies in several parts."""
    config = part.config
    is_split = (part.num_rows, part.num_columns) != (config.num_rows, config.dim)
    return is_split and trust_of(config.optimizer) != "row"


def _groups(lanes: Lanes) -> list[list[tuple[int, int]]]:
    """Lists the rectangles that hold the same rows of a table as (rank, part), in the order of columns."""
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for rank, (parts, tables) in enumerate(zip(lanes.parts, lanes.tables, strict=True)):
        for number, (part, table) in enumerate(zip(parts, tables, strict=True)):
            if part.num_columns < part.config.dim:
                found.setdefault((table, part.first_row), []).append((part.first_column, rank, number))
    return [[(rank, part) for _, rank, part in sorted(members)] for _, members in sorted(found.items())]
