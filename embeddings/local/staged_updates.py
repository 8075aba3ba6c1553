"""Updates in stages, for optimizers that need sums over a row or a table which several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from embeddings.kernels.grouping_kernels import Doubles, Floats, Keys
from embeddings.kernels.moment_kernels import take_gaps
from embeddings.kernels.sixteen_bit_kernels import Rounding, round_rows, widen_rows
from embeddings.kernels.threads import run_all
from embeddings.kernels.update_kernels import UpdateSettings
from embeddings.local.held_part import HeldPart
from embeddings.local.row_updates import Kernel


class WholeSums(Protocol):
    """Sums over the shards of a table, which a row optimizer needs where the table is split.

    Attributes:
        rounds: How often ``LocalRows.update`` calls ``exchange``: for rounds 0 to ``rounds - 1``, even with nothing to
            give. The same on every rank: the most that any table needs, see ``rounds_needed``.
    """

    rounds: int

    def exchange(
        self, round: int, over_columns: dict[int, Tensor], over_table: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Adds up partial sums of the shards of each table.

        Args:
            round: The number of the call within an update.
            over_columns: part -> [n, k] float64: sums over this part's columns, for each of the n rows that the batch
                moves, rows ascending. All shards of the same rows see the same ids, so they agree on the rows.
            over_table: part -> [k] float64: sums over this part's moved rows and columns; given even without any.

        Returns:
            The same keys and shapes; each the sum over the shards of the same rows, or of the table.
        """
        ...


class StagedRows:
    """The rows of one part that a batch moves, between the stages of their update.

    Args:
        part: Its number.
        held: The part.
        told: What the kernels are told.
        rows: [n], ascending.
        sums: [n, columns], their gradients; overwritten.
        measured: [n, MEASURES], of which IDS is set.
    """

    def __init__(
        self,
        part: int,
        held: HeldPart,
        told: tuple[UpdateSettings, Rounding],
        rows: Keys,
        sums: Floats,
        measured: Doubles,
    ) -> None:
        self.part, self.held = part, held
        self.measures, self.sizes = held.update.measures, held.update.sizes
        self._settings, self._rounding = told
        self._rows, self._sums, self.measured = rows, sums, measured
        first, second, last = held.states()
        self._stored, self._states = held.stored(), (first, second)
        self._wide, self._at = self._stored, rows
        take_gaps(rows, last, measured, self._settings)
        if self._stored.dtype != np.float32:
            self._wide, self._at = np.empty(sums.shape, np.float32), np.arange(rows.size, dtype=np.uint64)
            widen_rows(self._stored, rows, self._wide)

    def measure(self, number: int) -> None:
        """Runs the stage that measures for the exchange of a number."""
        self._run(self.measures[number])

    def finish(self) -> None:
        """Runs the last stage, after which the rows are updated."""
        self._run(self.held.update.finish)
        if self._wide is not self._stored:
            round_rows(self._stored, self._rows, self._wide, self._rounding)

    def _run(self, stage: Kernel) -> None:
        arrays = (self._wide, self._at, self._rows, self._sums, *self._states, self.measured)
        stage(*arrays, self._settings)


def run_stages(blocks: Sequence[StagedRows], whole: WholeSums | None) -> None:
    """Runs all stages of some parts' updates, and the exchanges between them.

    Raises:
        ValueError: When a part needs sums over more than it holds, and ``whole`` gives none.
    """
    rounds = whole.rounds if whole is not None else 0
    for number in range(max([rounds, *(len(block.measures) for block in blocks)])):
        measuring = [block for block in blocks if number < len(block.measures)]
        run_all([partial(block.measure, number) for block in measuring])
        over_columns, over_table = _partial_sums(measuring, number)
        if whole is not None and number < rounds:
            over_columns, over_table = whole.exchange(number, over_columns, over_table)
        elif over_columns or over_table:
            raise ValueError(f"update: expected more than {number} rounds of sums over split tables, got {rounds}")
        for block in measuring:
            for sums in (over_columns, over_table):
                if block.part in sums:
                    block.measured[:, : block.sizes[number]] = sums[block.part].numpy()
    run_all([block.finish for block in blocks])


def _partial_sums(measuring: Sequence[StagedRows], number: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    over_columns: dict[int, Tensor] = {}
    over_table: dict[int, Tensor] = {}
    for block in measuring:
        own = block.measured[:, : block.sizes[number]]
        if block.held.sums_over_table and number == len(block.measures) - 1:
            total = own.sum(axis=0)
            if block.held.has_whole_table:
                own[:] = total
            else:
                over_table[block.part] = torch.from_numpy(total)
        elif not block.held.has_all_columns:
            over_columns[block.part] = torch.from_numpy(own.copy())
    return over_columns, over_table
