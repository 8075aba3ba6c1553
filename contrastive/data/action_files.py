"""Reads files of one row per action (CSV, TSV, Parquet, MovieLens), through the same parsers as click logs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from contrastive.data.sequence_schema import SequenceSchema
from contrastive.data.sequences import SequenceData
from dlrm.data.cells import BadCell, to_ids, to_labels, to_times
from dlrm.data.chunk import Ids
from dlrm.data.dataset import Array, Bags, IntArray
from dlrm.data.formats import BlockParser, check_names, find_source, plan_blocks
from dlrm.data.parse import name_place
from dlrm.data.schema import CategoricalColumn, SourceFormat
from dlrm.data.source import one_line
from dlrm.data.tabular import ID_TYPE, Wanted

BLOCK_BYTES = 16 << 20
_TIMES = {"time", "timestamp", "datetime", "date", "ts", "at"}
_WORDS = re.compile(r"[^A-Za-z]|(?<=[a-z])(?=[A-Z])")  # lies between two
Found = TypeVar("Found")


@dataclass(kw_only=True)
class _Column:
    """Keys of a column's values over all tables, and the text of each."""

    name: str
    keys: list[IntArray] = field(default_factory=list)
    known: dict[int, str] = field(default_factory=dict)

    def add(self, ids: Ids, kept: Array) -> None:
        assert not isinstance(ids.codes, Bags)
        codes = ids.codes
        if (codes < 0).any():
            problem = f"expected the name of a {self.name}, got nothing; remove the row"
            raise BadCell(self.name, int(np.argmax(codes < 0)), problem)
        here = codes[kept]
        for code in np.unique(here):
            self.known.setdefault(int(ids.keys[code]), ids.values[int(code)].as_py())
        self.keys.append(ids.keys[here])

    def number(self) -> tuple[IntArray, pa.LargeStringArray]:
        """Number the values in the order in which they first come, from 0; return them, and the names."""
        keys, first, inverse = np.unique(np.concatenate(self.keys), return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(keys), dtype=np.int64)
        rank[order] = np.arange(len(keys))
        return rank[inverse], pa.array([self.known[int(key)] for key in keys[order]], pa.large_string())


def read_actions(schema: SequenceSchema, sources: Sequence[Path | str], block_bytes: int = BLOCK_BYTES) -> SequenceData:
    """Read all actions, and order those of each user by time; equal times keep the order of the rows.

    Users and items are numbered in the order in which they first come.

    Raises:
        ValueError: a file is absent, damaged or empty, or a cell does not fit the schema; file and line are named.
    """
    users, items, times = _Column(name=schema.user), _Column(name=schema.item), list[Array]()
    types = {schema.user: ID_TYPE, schema.item: ID_TYPE}
    types |= {name: pa.string() for name in (schema.time, schema.label) if name is not None}

    def take(table: pa.Table) -> None:
        kept = np.ones(len(table), dtype=bool)
        if schema.label is not None:
            labels = to_labels(_whole(table, schema.label), schema.label, schema.label_threshold)
            kept = labels.astype(bool)
        for column in (users, items):
            config = CategoricalColumn(name=column.name, min_count=1)
            column.add(to_ids(_whole(table, column.name), config), kept)
        if schema.time is not None:
            times.append(to_times(_whole(table, schema.time), schema.time)[kept])

    assert schema.format is not None
    assert schema.format != "lines"
    for _ in each_table(schema.format, sources, types, take, block_bytes):
        pass
    if not any(len(keys) for keys in users.keys):
        raise ValueError(f"expected actions in {', '.join(map(str, sources))}, found none; check the files")
    return _group(users, items, np.concatenate(times) if times else None)


def find_unused_times(schema: SequenceSchema, sources: Sequence[Path | str]) -> list[str]:
    """Return the columns whose names say that they may hold times, and of which the schema makes no use."""
    assert schema.format is not None
    assert schema.format != "lines"
    used = {schema.user, schema.item, schema.time, schema.label}
    columns = find_source(schema.format, [Path(source) for source in sources]).columns
    names = dict.fromkeys(name for of_file in columns for name in of_file)
    return [name for name in names if name not in used and _TIMES & set(_WORDS.sub(" ", name).lower().split())]


def _group(users: _Column, items: _Column, times: Array | None) -> SequenceData:
    user, user_names = users.number()
    item, item_names = items.number()
    order = np.arange(len(user)) if times is None else np.argsort(times, kind="stable")
    order = order[np.argsort(user[order], kind="stable")]
    counts = np.bincount(user, minlength=len(user_names))
    return SequenceData(
        users=user_names,
        items=item_names,
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        actions=item[order] + 1,
        times=None if times is None else times[order],
    )


def each_table(
    kind: SourceFormat,
    sources: Sequence[Path | str],
    types: dict[str, pa.DataType],
    take: Callable[[pa.Table], Found],
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Found]:
    """Yield what `take` makes of each table of the files, of about `block_bytes` each.

    Args:
        kind: how the files are written.
        sources: files, folders or globs.
        types: the columns to read, with the type that text is parsed as.
        take: may raise `BadCell`.
        block_bytes: of text in one table.

    Raises:
        ValueError: a file or a column is absent, a file is damaged, or a cell does not fit; file and line are named.
    """
    source = find_source(kind, [Path(source) for source in sources])
    for file, columns in zip(source.files, source.columns, strict=True):
        for name in types:
            if name not in columns:
                raise ValueError(f"{file}: expected a column '{name}', found {', '.join(columns)}; name the right one")
    check_names(source, tuple(types))
    parser = BlockParser(wanted=Wanted(types), joined=source.joined)
    with tempfile.TemporaryDirectory(prefix="recforge-") as scratch:
        blocks = plan_blocks(
            source, parser.wanted, block_bytes=block_bytes, scratch=Path(scratch), is_done=lambda index: False
        )
        for block in blocks:
            text, row = parser.read(block) if block.form else b"", block.start
            try:
                for table in parser.tables(block, text):
                    yield take(table)
                    row += len(table)
            except BadCell as bad:
                raise ValueError(f"{block.source}, {name_place(block, text, row, bad.row)}: {bad}") from bad
            except pa.ArrowException as error:
                raise ValueError(
                    f"{block.source} is damaged or cut short ({one_line(error)}); fetch it again"
                ) from error
            if block.path != block.source:
                Path(block.path).unlink()


def _whole(table: pa.Table, name: str) -> pa.Array:
    whole = table.column(name).combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
