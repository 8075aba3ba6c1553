"""Tables as a checkpoint has them: every rank gives and takes its rectangles, and tables may have grown or shrunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dlrm.checkpoints.pieces import Far, PartedTensor, Parts, Piece, as_parts, piece_of
from dlrm.config import ResizedTables
from embeddings.interface import FarTable, TableRows, Tables
from embeddings.tables import TableConfig

FLAG = "--checkpoint.resized-tables"
WEIGHT = ".weight"
FAR_ROWS = 1 << 14  # written to other processes at a time


def table_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return how the keys of each set of tables begin in the model's state dict."""
    return tuple(f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, Tables))


def take_tables(model: nn.Module) -> Parts:
    """Return the live pieces that this rank saves: `<table>.weight` and the row optimizer's `<table>.<state>`.

    What belongs to a whole row is held alike by all shards of its columns, and saved by the first of them; a counter by
    the first shard of the table.
    """
    found: dict[str, list[tuple[Tensor, tuple[int, ...], tuple[int, ...]]]] = {}
    for key, rows in _all_rows(model):
        if not rows.is_primary:
            continue
        for name, tensor in {"weight": rows.weight, **rows.state}.items():
            place = _place(rows, tensor)
            if tensor.ndim == 2 or (rows.first_column == 0 and (tensor.ndim == 1 or rows.first_row == 0)):
                found.setdefault(f"{key}.{name}", []).append((tensor, *place))
    live = {
        name: PartedTensor(
            shape=held[0][2],
            dtype=held[0][0].dtype,
            pieces=tuple(piece_of(tensor, first) for tensor, first, _ in held),
        )
        for name, held in found.items()
    }
    return Parts(live | {f"{key}.{name}": part for key, far in _far_tables(model) for name, part in _parts_of(far)})


def load_tables(
    model: nn.Module, stored: Mapping[str, PartedTensor | Tensor], resized: ResizedTables
) -> tuple[str, ...]:
    """Set this rank's rectangles to what was stored; return a line for each table that is not as it was.

    Raises:
        ValueError: a table is not as it was, and `resized` does not allow it.
    """
    parts = _name_as_now(model, as_parts(stored))
    lines = _compare(dict(_all_configs(model)), parts, resized)
    for key, rows in _all_rows(model):
        if f"{key}{WEIGHT}" in parts:
            _load_rows(key, rows, parts)
    for key, far in _far_tables(model):
        if f"{key}{WEIGHT}" in parts:
            _load_far(key, far, parts)
    return lines


def _name_as_now(model: nn.Module, parts: Parts) -> Parts:
    """Take the names of sets from tables that carried them because there were two, where nothing else is called so."""
    known = {key for key, _ in _all_configs(model)}
    sets = [(name, module) for name, module in model.named_modules() if isinstance(module, Tables)]
    former = {f"{name}.{config.name}": config.name for name, module in sets for config in module.table_configs}
    names = {old: new for old, new in former.items() if new in known and f"{new}{WEIGHT}" not in parts}
    named = {}
    for key, part in parts.items():
        table, _, tensor = key.rpartition(".")
        named[f"{names.get(table, table)}.{tensor}"] = part
    return Parts(named)


def _compare(
    configs: Mapping[str, TableConfig], parts: Mapping[str, PartedTensor], resized: ResizedTables
) -> tuple[str, ...]:
    stored = {name.removesuffix(WEIGHT): tensor.shape for name, tensor in parts.items() if name.endswith(WEIGHT)}
    lines = []
    for key in (*configs, *(key for key in stored if key not in configs)):
        config, shape = configs.get(key), stored.get(key)
        if config is None:
            assert shape is not None
            different, kept = "no such table", f"its {shape[0]:,} rows are dropped"
        elif shape is None:
            different, kept = f"{config.num_rows:,} rows", "it is new, and starts with its initial rows"
        elif shape[1] != config.dim:
            raise ValueError(
                f"expected a checkpoint of this model, got table {key!r} of dim {shape[1]} instead of {config.dim}; "
                "choose another --output"
            )
        elif shape[0] == config.num_rows:
            continue
        elif shape[0] < config.num_rows:
            different, kept = f"{config.num_rows:,} rows", f"rows from {shape[0]:,} on start with their initial values"
        else:
            different, kept = f"{config.num_rows:,} rows", f"rows from {config.num_rows:,} on are dropped"
        saved = "no such table" if shape is None else f"{shape[0]:,} rows"
        if resized == "refuse":
            raise ValueError(
                f"expected a checkpoint of this model, got one with {saved} for table {key!r}, which has {different} "
                f"now ({FLAG} keep would go on: {kept}); set that, or choose another --output"
            )
        lines.append(f"table {key!r}: {saved} in the checkpoint, {different} now; {kept}")
    return tuple(lines)


def _load_rows(key: str, rows: TableRows, parts: Mapping[str, PartedTensor]) -> None:
    tensors = {"weight": rows.weight, **rows.state}
    _check_states(key, {name: tensor.ndim for name, tensor in tensors.items()}, parts)
    for name, tensor in tensors.items():
        source = parts[f"{key}.{name}"]
        first, _ = _place(rows, tensor)
        common = tensor[: max(0, source.shape[0] - rows.first_row)] if first else tensor
        try:
            source.read_into(common, first)
        except ValueError as error:
            raise ValueError(f"{key}.{name}: {error}; choose another --output") from None


def _load_far(key: str, far: FarTable, parts: Mapping[str, PartedTensor]) -> None:
    """Write the rows that both have to where they lie, block by block."""
    shapes = far.tensors()
    _check_states(key, {name: len(shape) for name, (shape, _) in shapes.items()}, parts)
    sources = {name: parts[f"{key}.{name}"] for name in shapes}
    end = min(far.config.num_rows, sources["weight"].shape[0])
    for start in range(0, end, FAR_ROWS):
        block = {
            name: torch.empty((min(FAR_ROWS, end - start), *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in shapes.items()
            if shape
        }
        for name, tensor in block.items():
            try:
                sources[name].read_into(tensor, (start, *(0 for _ in tensor.shape[1:])))
            except ValueError as error:
                raise ValueError(f"{key}.{name}: {error}; choose another --output") from None
        far.write(start, block)
    far.write_counters({name: sources[name].read() for name, (shape, _) in shapes.items() if not shape})


def _check_states(key: str, expected: Mapping[str, int], parts: Mapping[str, PartedTensor]) -> None:
    """Check that a table is stored with the tensors that it has, of as many dimensions."""
    states = sorted(name.removeprefix(f"{key}.") for name in parts if name.rpartition(".")[0] == key)
    if states != sorted(expected):
        raise ValueError(
            f"expected a checkpoint of this model, got table {key!r} with {', '.join(states)} instead of "
            f"{', '.join(sorted(expected))}: another optimizer of rows; choose another --output"
        )
    for name, dimensions in expected.items():
        stored = len(parts[f"{key}.{name}"].shape)
        if stored != dimensions:
            raise ValueError(
                f"expected a checkpoint of this model, got {key}.{name} of {stored} dimensions instead of "
                f"{dimensions}: another optimizer of rows; choose another --output"
            )


def _parts_of(table: FarTable) -> Iterator[tuple[str, PartedTensor]]:
    """Yield the tensors of a table that other processes hold, to be read as they are saved."""
    read_rows = partial(_read_rows, table)
    for name, (shape, dtype) in table.tensors().items():
        read = partial(_read_far, table, name)
        far = Far(read_rows, name) if shape else None
        piece = Piece(first=(0,) * len(shape), shape=shape, read=read, far=far)
        yield name, PartedTensor(shape=shape, dtype=dtype, pieces=(piece,))


def _read_far(table: FarTable, name: str, start: int, stop: int) -> Tensor:
    with _away(table):
        is_counter = not table.tensors()[name][0]
        return table.read_counters()[name] if is_counter else table.read(start, stop, [name])[name]


def _read_rows(table: FarTable, start: int, stop: int) -> dict[str, Tensor]:
    with _away(table):
        return table.read(start, stop)


@contextmanager
def _away(table: FarTable) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # not one of the disk, as a save would take it to be
        raise ValueError(f"table {table.config.name!r}: {error}") from error


def _place(rows: TableRows, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where a tensor of a rectangle begins in that of the whole table, and the latter's shape."""
    config = rows.config
    if tensor.ndim == 0:
        return (), ()
    if tensor.ndim == 1:
        return (rows.first_row,), (config.num_rows,)
    return (rows.first_row, rows.first_column), (config.num_rows, config.dim)


def _all_rows(model: nn.Module) -> Iterator[tuple[str, TableRows]]:
    for prefix, tables in _sets(model):
        for rows in tables.rows():
            yield f"{prefix}{rows.config.name}", rows


def _far_tables(model: nn.Module) -> Iterator[tuple[str, FarTable]]:
    for prefix, tables in _sets(model):
        for far in tables.far_tables():
            yield f"{prefix}{far.config.name}", far


def _all_configs(model: nn.Module) -> Iterator[tuple[str, TableConfig]]:
    for prefix, tables in _sets(model):
        for config in tables.table_configs:
            yield f"{prefix}{config.name}", config


def _sets(model: nn.Module) -> list[tuple[str, Tables]]:
    """Return every set of tables and how its tables' names begin: with nothing unless two are called alike.

    So a model may have its tables in one set here, and in several elsewhere.
    """
    sets = [
        (f"{name}." if name else "", module) for name, module in model.named_modules() if isinstance(module, Tables)
    ]
    names = [config.name for _, tables in sets for config in tables.table_configs]
    return sets if len(set(names)) < len(names) else [("", tables) for _, tables in sets]
