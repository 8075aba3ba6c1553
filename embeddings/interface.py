"""What every kind of tables offers to the model, the schedule, checkpoints and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embeddings.jagged import Jagged
from embeddings.stopwatch import Stopwatch
from embeddings.tables import IdOutOfRangeError, TableConfig, check_tables

_COPIED_NUMBERS = 1 << 20  # of rows that lie elsewhere, at a time


class TableRows(NamedTuple):
    """What this process holds of one table, as live tensors: writing into them changes the table.

    A rectangle of the whole table [num_rows, dim]: all of it, or a shard.
    """

    config: TableConfig
    weight: Tensor  # [rows, columns]
    state: Mapping[str, Tensor]  # of the row optimizer, by name: [rows, columns], [rows], or [] for a counter
    first_row: int = 0
    first_column: int = 0
    is_primary: bool = True  # False for a copy of what another rank holds as well, and saves


class FarTable(Protocol):
    """A whole table whose rows lie in other processes: they are read and written some at a time."""

    @property
    def config(self) -> TableConfig:
        """The table."""

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names its tensors, ``weight`` and those of the row optimizer's state: shape of the whole, and type."""

    def read(self, first: int, last: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Copies rows [first, last) by name: of all tensors but counters, or of some; no more than these are kept."""

    def write(self, first: int, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the rows from ``first`` on, as ``read`` gives them."""

    def read_counters(self) -> dict[str, Tensor]:
        """Copies the tensors that are of no row, by name."""

    def write_counters(self, counters: Mapping[str, Tensor]) -> None:
        """Overwrites them."""


def read_blocks(table: FarTable) -> Iterator[TableRows]:
    """Copies a table's rows, some at a time; counters are left out."""
    step = max(1, _COPIED_NUMBERS // table.config.dim)
    for first in range(0, table.config.num_rows, step):
        state = table.read(first, min(first + step, table.config.num_rows))
        yield TableRows(table.config, state.pop("weight"), state, first)


class Tables(nn.Module, ABC):
    """Tables whose rows are updated inside backward.

    Rows are neither parameters nor buffers: the dense optimizer must not see them, ``model.to(...)`` must not move
    or round them, and a table may have a name that a module cannot (``type``, ``a.b``). They are in the state dict.

    Raises:
        ValueError: When two tables share a name or a feature.
    """

    def __init__(self, configs: Sequence[TableConfig]) -> None:
        super().__init__()
        check_tables(configs)
        self.table_configs: tuple[TableConfig, ...] = tuple(configs)
        self.feature_names: tuple[str, ...] = tuple(name for config in configs for name in config.features)
        self.feature_dims: tuple[int, ...] = tuple(config.dim for config in configs for _ in config.features)
        self.feature_tables: tuple[int, ...] = tuple(t for t, config in enumerate(configs) for _ in config.features)
        self.stopwatch = Stopwatch()  # whoever measures puts theirs here
        self.notes: list[str] = []  # what is done otherwise than asked for, a line each

    @abstractmethod
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Looks up and pools: values [batch_size, sum(feature_dims)], keys = ``feature_names``.

        Features may come in any order, and others may lie between them. Rows are updated when backward comes by, but
        only of what was looked up in training mode and with gradients enabled.

        Raises:
            IdOutOfRangeError: When an id lies outside its table; nothing has been read or updated then.
            ValueError: When a feature is missing from ``features``, or they do not fit together.
        """

    @abstractmethod
    def set_learning_rate_factors(self, factors: Sequence[float]) -> None:
        """Multiplies each table's own ``learning_rate`` by its factor from the next backward on.

        Args:
            factors: One of each table, in the order of ``table_configs``.

        Raises:
            ValueError: When there are not as many as tables, or a kernel has one for tables whose factors differ.
        """

    @abstractmethod
    def set_eps_factor(self, factor: float) -> None:
        """Multiplies every table's own ``eps`` from the next backward on; it is not in the state dict.

        ``eps`` is compared with gradients of the mean over a batch, and so has to follow them to another batch size.
        """

    @abstractmethod
    def rows(self) -> Iterator[TableRows]:
        """Gives every table's live rows and their optimizer's state, in the order of ``table_configs``.

        Nothing where they lie in other processes, which ``far_tables`` are for.
        """

    def far_tables(self) -> Sequence[FarTable]:
        """Gives the tables of which no process has live rows: none, or all of them, in the order of configurations."""
        return ()

    def prefetch(self, features: KeyedJaggedTensor) -> None:
        """Begins what a later ``forward`` of the same object needs and what no row has a part in: exchanging ids.

        On several ranks it is a collective call; nothing to do where all rows are at hand.
        """

    def check_ids(self) -> None:
        """Waits until the ids of the last ``forward`` are known to be right, where it returned before that: on a GPU.

        Raises:
            IdOutOfRangeError: When one of them lies outside its table; its rows have not been updated if there was no
                backward since.
        """

    def check_factors(self, factors: Sequence[float]) -> None:
        """Checks that there is one factor of each table.

        Raises:
            ValueError: When there is not.
        """
        if len(factors) != len(self.table_configs):
            raise ValueError(f"factors: expected one of each of {len(self.table_configs)} tables, got {len(factors)}")

    def keyed(self, pooled: Tensor) -> KeyedTensor:
        """Names the columns of ``pooled`` [batch_size, sum(feature_dims)]."""
        return KeyedTensor(keys=list(self.feature_names), length_per_key=list(self.feature_dims), values=pooled)

    def id_error(self, batch: Jagged, feature: int, at: int) -> IdOutOfRangeError:
        """Makes the error for ``batch.ids[at]`` of a feature, which lies outside the feature's table."""
        config = self.table_configs[self.feature_tables[feature]]
        return IdOutOfRangeError(
            feature=self.feature_names[feature],
            table=config.name,
            num_rows=config.num_rows,
            bag=batch.bag_of(at),
            id=int(batch.ids[at]),
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self._state_tensors(prefix):
            destination[key] = tensor.detach()

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = dict(self._state_tensors(prefix))
        for key, tensor in own.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != tensor.shape:
                error_msgs.append(f"{key}: expected shape {tuple(tensor.shape)}, got {tuple(state_dict[key].shape)}")
            else:
                tensor.copy_(state_dict[key])
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in own)

    def _state_tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for rows in self.rows():
            table = f"{prefix}{rows.config.name}"
            if tuple(rows.weight.shape) != (rows.config.num_rows, rows.config.dim):
                # A process may hold several rectangles of one table.
                table += f"[{rows.first_row}, {rows.first_column}]"
            yield f"{table}.weight", rows.weight
            for name, tensor in rows.state.items():
                yield f"{table}.{name}", tensor
