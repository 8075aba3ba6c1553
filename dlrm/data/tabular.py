"""Parses blocks of CSV, TSV and Parquet files into Arrow tables that hold the columns of a schema."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as pacsv

from dlrm.data.cells import BadCell, to_numbers
from dlrm.data.schema import DataSchema
from dlrm.data.source import Block, TextForm

# "NA" is not among them: it is a country, a continent and a gene.
MISSING_TEXTS = ["", "\\N", "NULL", "null", "None", "NaN", "nan"]
ID_TYPE = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class Wanted:
    """The columns to read, with the type that text is parsed as."""

    types: dict[str, pa.DataType]

    @staticmethod
    def of(schema: DataSchema) -> Wanted:
        """Return what `schema` needs; a column in two roles is read as text."""
        roles = [(schema.label, pa.string())]
        roles += [(schema.time, pa.string())] if schema.time else []
        roles += [(column.name, pa.float64()) for column in schema.numeric]
        roles += [(column.name, pa.string() if column.is_list else ID_TYPE) for column in schema.categorical]
        types: dict[str, pa.DataType] = {}
        for name, kind in roles:
            types[name] = kind if name not in types else pa.string()
        return Wanted(types)

    def only(self, columns: tuple[str, ...]) -> Wanted:
        """Return those of the columns that are among `columns`."""
        return Wanted({name: kind for name, kind in self.types.items() if name in columns})


def parse_text(block: Block, text: bytes, wanted: Wanted) -> pa.Table:
    """Parse the text of a block.

    Raises:
        BadCell: a row has too few or too many cells, or a number is none.
    """
    assert block.form is not None
    try:
        return _parse(text, block.form, wanted.types)
    except pa.ArrowInvalid as error:
        _find_bad_cell(text, block.form, wanted)
        raise BadCell(", ".join(wanted.types), 0, f"cannot be parsed ({error})") from error


def _parse(text: bytes, form: TextForm, types: dict[str, pa.DataType]) -> pa.Table:
    broken: list[pacsv.InvalidRow] = []

    def note(row: pacsv.InvalidRow) -> str:
        broken.append(row)
        return "error"

    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(column_names=form.columns, use_threads=False, block_size=len(text) + 1),
            parse_options=pacsv.ParseOptions(
                delimiter=form.delimiter,
                quote_char='"' if form.quoted else False,
                newlines_in_values=form.quoted,
                invalid_row_handler=note,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=types, include_columns=list(types), null_values=MISSING_TEXTS, strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        if broken:
            row = broken[0]
            raise BadCell(
                form.columns[min(row.actual_columns, len(form.columns)) - 1],
                row.number - 1,
                f"expected {row.expected_columns} cells in the row, got {row.actual_columns}; correct the row",
            ) from None
        raise
    return table.combine_chunks()


def _find_bad_cell(text: bytes, form: TextForm, wanted: Wanted) -> None:
    try:
        table = _parse(text, form, dict.fromkeys(wanted.types, pa.binary()))
    except pa.ArrowInvalid:
        return
    for name, kind in wanted.types.items():
        cells = table.column(name).combine_chunks()
        for row, cell in enumerate(cells.to_pylist()):
            try:
                (cell or b"").decode()
            except UnicodeDecodeError:
                raise BadCell(name, row, f"expected UTF-8 text, got {cell!r}; convert the file to UTF-8") from None
        if pa.types.is_floating(kind):
            to_numbers(cells.cast(pa.string()), name)


def find_line(block: Block, text: bytes, row: int) -> int:
    """Return the line of the source on which a row of a text block begins, from 1."""
    assert block.form is not None
    lines = text.decode("utf-8", errors="replace")
    if not block.form.quoted:
        numbers = [number for number, line in enumerate(lines.split("\n")) if line.strip("\r")]
        return block.first_line + (numbers[row] if row < len(numbers) else 0)
    rows, line = csv.reader(io.StringIO(lines, newline=""), delimiter=block.form.delimiter), 0
    for cells in rows:
        if cells:
            if not row:
                break
            row -= 1
        line = rows.line_num
    return block.first_line + line


def plan_parquet(files: list[tuple[str, int]], wanted: Wanted, block_bytes: int) -> Iterator[Block]:
    """Yield a block per row group; a chunk has about `block_bytes` bytes, taken as 8 per cell."""
    rows_per_chunk = max(block_bytes // (8 * len(wanted.types)), 1)
    total = sum(size for _, size in files) or 1
    index = 0
    for path, size in files:
        metadata = pq.read_metadata(path)
        first = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            chunks = -(-rows // rows_per_chunk)
            if rows:
                yield Block(
                    index=index,
                    chunks=chunks,
                    source=path,
                    path=path,
                    start=first,
                    stop=first + rows,
                    row_group=group,
                    share=size / total * rows / metadata.num_rows,
                )
            index, first = index + chunks, first + rows


def read_parquet(block: Block, wanted: Wanted) -> Iterator[pa.Table]:
    """Yield the tables of a block, one per chunk."""
    rows_per_chunk = -(-(block.stop - block.start) // block.chunks)
    with pq.ParquetFile(block.path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(
            batch_size=rows_per_chunk, row_groups=[block.row_group], columns=list(wanted.types), use_threads=False
        ):
            yield pa.Table.from_batches([batch])
