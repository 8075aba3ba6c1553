"""What all members of a run must agree on: its tables and rules, as JSON that travels and is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from embeddings.hashed.growth import Growth as Growth
from embeddings.row_optimizers import RowOptimizer
from embeddings.tables import TableConfig, check_tables

Durability = Literal["none", "snapshot", "journal"]
DenseMode = Literal["easgd", "average", "sgd", "adagrad", "adam"]
"""``easgd``, ``average``: trainers update their own copy; else: the server does, with their gradients."""

_OPTIMIZERS = {kind.__name__: kind for kind in get_args(RowOptimizer)}


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """A run, as its coordinator keeps it and every member knows it.

    Attributes:
        run_id: Sets its frames apart from those of other runs.
        seed: Of the rows' first values.
        tables: In the order of their numbers.
        growth: Of tables by name; those it does not name keep all rows.
        lanes: How many trainers may take part at a time; each unfinished piece of data is in a lane of its own.
        staleness: Steps that a trainer may be ahead of the slowest; None: as many as it likes.
        durability: What survives a shard.
        dense: How trainers' copies of the dense part are combined.
        samples: Of the whole run: all epochs' samples, in the order of the stream.
        epoch_samples: Of one epoch; no batch crosses its end.
        first_sample: Where the run begins, if what comes before was trained elsewhere; a lane's clocks begin there.
        batch_size: Samples per step of one trainer.
        chunk_batches: Batches that a trainer is given at a time.
        alone_samples: Of the stream, up to which one trainer works while the others wait.
        settings: Further ones, by name, in which members must not differ.

    Raises:
        ValueError: When a number cannot be, names are unknown or come twice, or no shard can hold a table.
    """

    run_id: int
    seed: int
    tables: tuple[TableConfig, ...]
    growth: dict[str, Growth] = field(default_factory=dict)
    lanes: int = 64
    staleness: int | None = None
    durability: Durability = "snapshot"
    dense: DenseMode = "easgd"
    samples: int = 0
    epoch_samples: int = 0
    first_sample: int = 0
    batch_size: int = 1
    chunk_batches: int = 16
    alone_samples: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from embeddings.hashed.push_checks import check_config

        check_tables(self.tables)
        for table in self.tables:  # here, since shards would not start with a run that a trainer has brought
            check_config(table)
        names = {table.name for table in self.tables}
        if unknown := self.growth.keys() - names:
            raise ValueError(f"growth: expected names of tables, got {min(unknown)!r}")
        for name in ("lanes", "batch_size", "chunk_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.staleness is not None and self.staleness < 0:
            raise ValueError(f"staleness: expected a number >= 0, or none, got {self.staleness}")

    def to_json(self) -> str:
        """Writes the description; equal ones give equal texts."""
        plain = asdict(self)
        for table, described in zip(self.tables, plain["tables"], strict=True):
            described["optimizer"]["kind"] = type(table.optimizer).__name__
        return json.dumps(plain, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> RunDescription:
        """Reads what ``to_json`` has written.

        Raises:
            ValueError: When it is not a description.
        """
        try:
            plain = json.loads(text)
            plain["tables"] = tuple(_read_table(table) for table in plain["tables"])
            plain["growth"] = {name: Growth(**growth) for name, growth in plain["growth"].items()}
            return RunDescription(**plain)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"run description: expected one of this release, got {error!r}") from error

    def differences(self, other: RunDescription) -> list[str]:
        """Names the settings in which another description differs, but for the run's number."""
        return [
            entry.name
            for entry in fields(self)
            if entry.name != "run_id" and getattr(self, entry.name) != getattr(other, entry.name)
        ]


def _read_table(plain: dict[str, Any]) -> TableConfig:
    optimizer = dict(plain["optimizer"])
    kind = _OPTIMIZERS[optimizer.pop("kind")]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in optimizer.items()}
    return TableConfig(**{**plain, "features": tuple(plain["features"]), "optimizer": kind(**given)})
