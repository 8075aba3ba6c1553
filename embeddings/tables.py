"""What a table is: a frozen description without torch, checked when it is made, and the error of an id outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from embeddings.row_optimizers import RowOptimizer, RowWiseAdagrad

Pooling = Literal["sum", "mean"]
RowType = Literal["fp32", "bf16", "fp16"]
ROW_TYPES: dict[RowType, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""torch's names of them."""
Memory = Literal["device", "uvm", "uvm_caching"]
UNBOUNDED = 2**63 - 1
"""A ``num_rows`` of tables whose rows come into being on demand: any int64 is an id."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """One table of rows and the features whose ids are looked up in it.

    Attributes:
        name: The table's name; its rows are ``<name>.weight`` in a checkpoint.
        num_rows: Ids lie in ``[0, num_rows)``; ``UNBOUNDED``: anywhere, on a parameter server.
        dim: Numbers per row.
        features: Features that share the table; empty means one feature of the table's own name.
        pooling: How the rows of one bag become one vector. An empty bag gives zeros under both.
        optimizer: How rows are updated inside backward.
        init_scale: Rows start uniform in ``[-init_scale, init_scale)``; ``None`` means ``1 / sqrt(num_rows)``.
        row_type: How rows are stored. Pooling and updating compute in fp32; what is stored in 16 bits is rounded up
            or down at random, in proportion, so that small updates are not lost. Optimizer states stay in fp32.
        memory: Where a GPU's rows lie: in the ``device``'s own memory; in the host's, which the GPU reads and writes
            over the bus (``uvm``); or there with a cache of a fifth of them in the device's (``uvm_caching``).
        group: Tables of one group always have the same learning rate factor; fbgemm has one for what it updates
            together. Our own kernels take any factor for any table.

    Raises:
        ValueError: When a setting is outside its range; the message names the table.
    """

    name: str
    num_rows: int
    dim: int
    features: tuple[str, ...] = ()
    pooling: Pooling = "sum"
    optimizer: RowOptimizer = field(default_factory=lambda: RowWiseAdagrad(learning_rate=0.05))
    init_scale: float | None = None
    row_type: RowType = "fp32"
    memory: Memory = "device"
    group: str = "tables"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"table: expected a name, got {self.name!r}")
        if not self.features:
            object.__setattr__(self, "features", (self.name,))
        for setting, number in (("num_rows", self.num_rows), ("dim", self.dim)):
            if number < 1:
                raise ValueError(f"table {self.name!r}: expected {setting} >= 1, got {number}")
        if self.pooling not in ("sum", "mean"):
            raise ValueError(f"table {self.name!r}: expected pooling 'sum' or 'mean', got {self.pooling!r}")
        if self.row_type not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"table {self.name!r}: expected row_type 'fp32', 'bf16' or 'fp16', got {self.row_type!r}")
        if self.memory not in ("device", "uvm", "uvm_caching"):
            expected = "'device', 'uvm' or 'uvm_caching'"
            raise ValueError(f"table {self.name!r}: expected memory {expected}, got {self.memory!r}")
        if self.init_scale is not None and not (math.isfinite(self.init_scale) and self.init_scale >= 0):
            raise ValueError(f"table {self.name!r}: expected init_scale to be a number >= 0, got {self.init_scale}")
        if self.num_rows == UNBOUNDED and self.init_scale is None:
            raise ValueError(f"table {self.name!r}: expected init_scale where num_rows is unbounded, got none")
        repeated = _first_repeated(self.features)
        if repeated is not None:
            raise ValueError(f"table {self.name!r}: expected each feature once in features, got {repeated!r} twice")

    @property
    def initial_scale(self) -> float:
        """Half the width of the interval that the rows start in."""
        return 1.0 / math.sqrt(self.num_rows) if self.init_scale is None else self.init_scale


class IdOutOfRangeError(ValueError):
    """An id of a batch lies outside its table.

    Attributes:
        feature: The feature that holds the id.
        table: The table that the feature is looked up in.
        num_rows: The table's number of rows.
        bag: Position of the bag in the batch, from 0.
        id: The id.
        others_know: Whether every other rank raises ``OtherRanksIdError`` at the same moment.
    """

    others_know = False

    def __init__(self, *, feature: str, table: str, num_rows: int, bag: int, id: int) -> None:
        super().__init__(
            f"feature {feature!r}, row {bag} of the batch: expected an id in [0, {num_rows}) for table {table!r}, "
            f"got {id}; raise the table's num_rows, or map unknown ids to its out-of-vocabulary row"
        )
        self.feature = feature
        self.table = table
        self.num_rows = num_rows
        self.bag = bag
        self.id = id


class OtherRanksIdError(ValueError):
    """An id of another rank's share of the batch lies outside its table; that rank can say which."""


def check_tables(configs: Sequence[TableConfig]) -> None:
    """Checks what holds between tables: names and features are unique.

    Raises:
        ValueError: When there is no table, or a table's or a feature's name occurs twice.
    """
    if not configs:
        raise ValueError("tables: expected at least one TableConfig, got none")
    repeated = _first_repeated([config.name for config in configs])
    if repeated is not None:
        raise ValueError(f"table {repeated!r}: expected each table's name once, got it twice")
    owner: dict[str, str] = {}
    for config in configs:
        for feature in config.features:
            if feature in owner:
                raise ValueError(
                    f"feature {feature!r}: expected one table per feature, "
                    f"got tables {owner[feature]!r} and {config.name!r}"
                )
            owner[feature] = config.name


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
