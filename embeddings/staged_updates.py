"""Updates in stages, for optimizers that need sums over a row or a table which several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.row_updates import RowUpdate
from embeddings.threads import run_all
from embeddings.update_kernels import Doubles, Floats, UpdateSettings

Keys = NDArray[np.uint64]


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
                touches, rows ascending. All shards of the same rows see the same ids, so they agree on the rows.
            over_table: part -> [k] float64: sums over this part's touched rows and columns; given even without any.

        Returns:
            The same keys and shapes; each the sum over the shards of the same rows, or of the table.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StagedRows:
    """The touched rows of one part, between the stages of their update."""

    part: int
    update: RowUpdate
    settings: UpdateSettings
    rows: Keys  # [n], ascending
    held: Floats  # rows[i] is held[at[i]]
    at: Keys
    sums: Floats  # [n, columns]
    first: Floats
    second: Floats
    measured: Doubles  # [n, MEASURES]
    last_measure_over: Literal["row", "touched"]
    has_all_columns: bool
    has_whole_table: bool

    def run(self, stage: Any) -> None:
        """Runs one of the optimizer's stages on all rows."""
        stage(
            self.held, self.at, self.rows, self.sums, self.first, self.second, self.measured, self.settings
        )  # fmt: skip


def run_stages(blocks: Sequence[StagedRows], whole: WholeSums | None) -> None:
    """Runs all stages of some parts' updates, and the exchanges between them."""
    rounds = whole.rounds if whole is not None else 0
    for number in range(max([rounds, *(len(block.update.measures) for block in blocks)])):
        measuring = [block for block in blocks if number < len(block.update.measures)]
        run_all([partial(block.run, block.update.measures[number]) for block in measuring])
        over_columns: dict[int, Tensor] = {}
        over_table: dict[int, Tensor] = {}
        for block in measuring:
            size = block.update.sizes[number]
            own = block.measured[:, :size]
            if block.last_measure_over == "touched" and number == len(block.update.measures) - 1:
                total = own.sum(axis=0)
                if block.has_whole_table:
                    own[:] = total
                else:
                    over_table[block.part] = torch.from_numpy(total)
            elif not block.has_all_columns:
                over_columns[block.part] = torch.from_numpy(np.ascontiguousarray(own))
        if whole is not None and number < rounds:
            over_columns, over_table = whole.exchange(number, over_columns, over_table)
        elif over_columns or over_table:
            raise ValueError(f"update: expected {number + 1} or more rounds of sums over a split table, got {rounds}")
        for block in measuring:
            size = block.update.sizes[number]
            if block.part in over_columns:
                block.measured[:, :size] = over_columns[block.part].numpy()
            elif block.part in over_table:
                block.measured[:, :size] = over_table[block.part].numpy()
    run_all([partial(block.run, block.update.finish) for block in blocks])
