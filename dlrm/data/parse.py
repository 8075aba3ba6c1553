"""The first stage of `prepare`: a block of the source becomes typed chunks in the work folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm.data.cells import BadCell, to_ids, to_labels, to_numbers, to_times
from dlrm.data.chunk import Chunk, read_facts, write_chunk
from dlrm.data.formats import BlockParser
from dlrm.data.schema import DataSchema
from dlrm.data.source import Block, one_line
from dlrm.data.tabular import find_line


@dataclass(frozen=True, kw_only=True)
class ParseTask:
    """Parse a block into `chunks/000000`, ... of the numbers that the block says."""

    block: Block
    parser: BlockParser
    schema: DataSchema
    chunks: Path

    @property
    def outputs(self) -> list[Path]:
        """The folders of the chunks."""
        return [chunk_folder(self.chunks, self.block.index + place) for place in range(self.block.chunks)]


def chunk_folder(chunks: Path, index: int) -> Path:
    """Return where a chunk lies."""
    return chunks / f"{index:06d}"


def parse_block(task: ParseTask) -> list[dict[str, Any]]:
    """Write the chunks of a block that are not there yet, and return the facts of all.

    Raises:
        ValueError: a cell does not fit the schema; column, file and line (or row) are named.
    """
    outputs = task.outputs
    if not all(folder.is_dir() for folder in outputs):
        _parse(task, outputs)
    return [read_facts(folder) for folder in outputs]


def _parse(task: ParseTask, outputs: Sequence[Path]) -> None:
    block = task.block
    text = task.parser.read(block) if block.form else b""
    first_row = block.start
    try:
        for folder, table in zip(outputs, task.parser.tables(block, text), strict=True):
            if not folder.is_dir():
                write_chunk(folder, build_chunk(table, task.schema))
            first_row += len(table)
    except BadCell as bad:
        raise ValueError(f"{block.source}, {name_place(block, text, first_row, bad.row)}: {bad}") from bad
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{block.source} is damaged or cut short ({one_line(error)}); fetch it again") from error
    if block.path != block.source:
        Path(block.path).unlink(missing_ok=True)


def name_place(block: Block, text: bytes, first_row: int, row: int) -> str:
    """Return where a row of a table stands in the source; of parquet files, the table begins with row `first_row`."""
    return f"line {find_line(block, text, row)}" if block.form else f"row {first_row + row + 1}"


def build_chunk(table: pa.Table, schema: DataSchema) -> Chunk:
    """Turn a table into typed columns; rows are sorted by time if the split is.

    Raises:
        BadCell: a cell does not fit the schema.
    """
    columns = {name: _whole(table.column(name)) for name in table.column_names}
    chunk = Chunk(
        label=to_labels(columns[schema.label], schema.label, schema.label_threshold),
        time=to_times(columns[schema.time], schema.time) if schema.time else None,
        numeric=tuple(to_numbers(columns[column.name], column.name) for column in schema.numeric),
        ids=tuple(to_ids(columns[column.name], column) for column in schema.categorical),
    )
    if schema.split.by != "time" or chunk.time is None or bool((chunk.time[:-1] <= chunk.time[1:]).all()):
        return chunk
    return chunk.take(np.argsort(chunk.time, kind="stable"))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole
