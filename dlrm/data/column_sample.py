"""Reads the first rows of a source, whatever its format, and measures each column: what `recforge init` decides by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv as pacsv

from dlrm.data.dataset import Array
from dlrm.data.formats import Source, check_names
from dlrm.data.movielens import join_attributes
from dlrm.data.source import TextForm, last_row_end, read_head
from dlrm.data.tabular import MISSING_TEXTS, Wanted

SAMPLE_BYTES = 32 << 20
SAMPLE_ROWS = 200_000  # of a parquet file
LOOK_AT_TIMES, DATE = 100, r"\d{4}-\d{2}-\d{2}"


@dataclass(frozen=True)
class ColumnSample:
    """The first values of a column, with the type that they suggest.

    Attributes:
        name: of the column.
        values: of the first rows.
        declared: type in a header that names types, else "".
        share: of all rows that are among the first, roughly.
    """

    name: str
    values: pa.Array
    declared: str = ""
    share: float = 1.0

    @cached_property
    def there(self) -> pa.Array:
        """The values that are not absent."""
        return self.values.drop_null()

    @property
    def missing_share(self) -> float:
        """The share of rows that have no value."""
        return float(self.values.null_count / max(len(self.values), 1))

    @cached_property
    def distinct(self) -> int:
        """The number of distinct values; of lists, of the values in them."""
        return len(pc.unique(self.there.flatten() if self.is_list else self.there))

    @property
    def is_list(self) -> bool:
        """Whether each cell holds a list."""
        return bool(pa.types.is_list(self.values.type) or pa.types.is_large_list(self.values.type))

    @property
    def is_text(self) -> bool:
        """Whether the values are text."""
        kind = self.values.type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    @cached_property
    def is_time(self) -> bool:
        """Whether the values are dates or timestamps, or the first ones can be read as such."""
        if pa.types.is_timestamp(self.values.type) or pa.types.is_date(self.values.type):
            return True
        head = self.there[:LOOK_AT_TIMES]
        return self.is_text and len(head) > 0 and all(re.match(DATE, str(text)) for text in head.to_pylist())

    @cached_property
    def numbers(self) -> Array | None:
        """The values as numbers; None if they are none."""
        kind = self.values.type
        real = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (real or pa.types.is_integer(kind) or pa.types.is_boolean(kind)) or not len(self.there):
            return None
        return np.asarray(self.there.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))

    @cached_property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.numbers is not None and bool(np.isfinite(self.numbers).all() and (self.numbers % 1 == 0).all())

    @property
    def is_unique(self) -> bool:
        """Whether no value is there twice; of lists, none of the values in them."""
        count = len(self.there.flatten() if self.is_list else self.there)
        return count > 1 and self.distinct == count

    def estimate_distinct(self) -> int:
        """Return the number of distinct values in the whole source: new ones are taken to appear as often as lately."""
        values = self.there.flatten() if self.is_list else self.there
        if self.share >= 1 or len(values) < 2:
            return self.distinct
        half = len(values) // 2
        fresh = self.distinct - len(pc.unique(values[:half]))
        return int(self.distinct + fresh / (len(values) - half) * len(values) * (1 / self.share - 1))


def sample_columns(source: Source) -> list[ColumnSample]:
    """Return a sample of every column of a source.

    Raises:
        ValueError: two columns have one name, or the rows are not like the header.
    """
    check_names(source, source.columns[0])
    file, form = source.files[0], source.forms[0]
    total = sum(path.stat().st_size for path in source.files) or 1
    if form is None:
        table, rows = _head_of_parquet(file)
        share = len(table) / max(rows, 1) * file.stat().st_size / total
    else:
        text = read_head(file, SAMPLE_BYTES)
        text = text if len(text) < SAMPLE_BYTES else text[: last_row_end(text, form.quoted)]
        if source.joined:
            types = dict.fromkeys(source.joined.columns, pa.string())
            here = {name: kind for name, kind in types.items() if name in form.columns}
            table = join_attributes(_parse(text, form, here), source.joined, Wanted(types))
        else:
            table = _parse(text, form, {})
        share = min(len(text) / total, 1.0)
    declared = source.joined.columns if source.joined else {}
    return [
        ColumnSample(name, _whole(table.column(name)), declared.get(name, ""), min(share, 1.0))
        for name in table.column_names
    ]


def _head_of_parquet(file: Path) -> tuple[pa.Table, int]:
    with pq.ParquetFile(file) as reader:
        batches, rows = [], 0
        for batch in reader.iter_batches(batch_size=1 << 14, use_threads=False):
            batches.append(batch)
            rows += len(batch)
            if rows >= SAMPLE_ROWS:
                break
        return pa.Table.from_batches(batches, schema=reader.schema_arrow), reader.metadata.num_rows


def _parse(text: bytes, form: TextForm, types: dict[str, pa.DataType]) -> pa.Table:
    try:
        return pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(
                column_names=form.columns, skip_rows=int(form.has_header), use_threads=False, block_size=len(text) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=form.delimiter, quote_char='"' if form.quoted else False, newlines_in_values=form.quoted
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=types, null_values=MISSING_TEXTS, strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"expected rows like the header {', '.join(form.columns)}: {error}; correct the file"
        ) from error


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole.combine_chunks() if isinstance(whole, pa.ChunkedArray) else whole


def find_shared_values(text: Sequence[str], separator: str) -> tuple[float, int, int]:
    """Return the share of texts that hold the separator, and the numbers of distinct texts and of distinct pieces."""
    pieces = {piece for cell in text for piece in cell.split(separator)}
    return sum(separator in cell for cell in text) / max(len(text), 1), len(set(text)), len(pieces)
