"""One rectangle of a table in memory: its rows, its optimizer's state, and how kernels see both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embeddings.initial_rows import initial_rows, random_stream
from embeddings.kernels.sixteen_bit_kernels import Rounding, Rows
from embeddings.kernels.update_kernels import UpdateSettings
from embeddings.local.row_memory import zero_rows
from embeddings.local.row_updates import make_state, row_update, settings_of
from embeddings.row_optimizers import moves_all_rows, trust_of
from embeddings.tables import ROW_TYPES, TableConfig

Floats = NDArray[np.float32]

_NO_STATE = np.empty((0, 1), np.float32)
_NUMBERS_DRAWN = 1 << 20
_AS_INTEGERS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}


class RowsPart(NamedTuple):
    """A rectangle of a table: rows [first_row, first_row + num_rows) of some columns, held by this process."""

    config: TableConfig
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int
    is_replicated: bool = False  # the whole table, which every rank holds: ``apply`` updates it instead of ``update``


def whole_table(config: TableConfig) -> RowsPart:
    """Gives the rectangle that is all of a table."""
    return RowsPart(config, 0, config.num_rows, 0, config.dim)


class HeldPart:
    """A rectangle's rows and state, starting as those of the whole table would.

    Args:
        part: Which rectangle.
        seed: See ``build_tables``.
    """

    def __init__(self, part: RowsPart, *, seed: int) -> None:
        config = part.config
        if part.num_rows > 1 << 32:
            raise ValueError(f"table {config.name!r}: expected num_rows <= 2**32, got {part.num_rows}")
        self.part = part
        self.update = row_update(config.optimizer)
        self.mean = config.pooling == "mean"
        self.weight: Tensor = zero_rows(
            part.num_rows, part.num_columns, dtype=getattr(torch, ROW_TYPES[config.row_type])
        )
        self._draw_rows(seed)
        self.state = make_state(config, part.num_rows, part.num_columns)
        self._seed = seed

    def _draw_rows(self, seed: int) -> None:
        # Some at a time, so that there is never a second table in memory.
        part, step = self.part, max(1, _NUMBERS_DRAWN // self.part.config.dim)
        for first in range(0, part.num_rows, step):
            some = self.weight[first : first + step]
            some.copy_(
                initial_rows(
                    part.config,
                    seed=seed,
                    first_row=part.first_row + first,
                    num_rows=some.shape[0],
                    first_column=part.first_column,
                    num_columns=part.num_columns,
                )
            )

    @property
    def has_all_columns(self) -> bool:
        """Whether its rows are whole."""
        return self.part.num_columns == self.part.config.dim

    @property
    def has_whole_table(self) -> bool:
        """Whether nothing of the table lies elsewhere."""
        return self.has_all_columns and self.part.num_rows == self.part.config.num_rows

    @property
    def sums_over_table(self) -> bool:
        """Whether the last measure of its optimizer is summed over the table, and not over a row."""
        return trust_of(self.part.config.optimizer) != "row"

    @property
    def is_staged(self) -> bool:
        """Whether its update needs sums over more than one row of it."""
        return bool(self.update.measures) and (not self.has_all_columns or self.sums_over_table)

    @property
    def moves_all_rows(self) -> bool:
        """Whether each update is one of all its rows."""
        return moves_all_rows(self.part.config.optimizer)

    def stored(self) -> Rows:
        """Gives the rows as kernels take them, see ``sixteen_bit_kernels``."""
        as_integers = _AS_INTEGERS.get(self.weight.dtype)
        stored: Rows = (self.weight if as_integers is None else self.weight.view(as_integers)).numpy()
        return stored

    def states(self) -> tuple[Floats, Floats, Floats]:
        """Gives the state as kernels take it: three arrays of two dimensions, empty where there is less."""
        named = [self.state[name] for name in self.update.states]
        arrays = [tensor.view(tensor.shape[0], -1).numpy() for tensor in named]
        first, second, last = [*arrays, *[_NO_STATE] * 3][:3]
        return first, second, last

    def count_update(self, factor: float, eps_factor: float) -> tuple[UpdateSettings, Rounding]:
        """Counts an update, and gives what its kernels are told; the factors are on the learning rate and ``eps``."""
        config, updates = self.part.config, 0
        if "updates" in self.state:
            self.state["updates"] += 1
            updates = int(self.state["updates"])
        stream = random_stream(config, self._seed, updates) if config.row_type != "fp32" else 0
        settings = settings_of(config, updates, factor, eps_factor)
        return settings, Rounding(stream, self.part.first_row, self.part.first_column)
