"""A chunk: some ten thousand rows of the source in typed columns, and its files in the work folder of `prepare`.

Within a chunk every categorical column is a small dictionary of its own: the distinct values, their keys (XXH64 of the
text as UTF-8: the same on every machine), and one code per row. All later stages work on keys and codes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from dlrm.data.dataset import Array, Bags, IntArray
from dlrm.data.work import whole_folder

MISSING_CODE = -1
ROWS, VALUES, FACTS = "rows.arrow", "values.arrow", "facts.json"
VALUES_SCHEMA = pa.schema([("key", pa.uint64()), ("value", pa.large_string())])


@dataclass(frozen=True, kw_only=True)
class Ids:
    """A categorical column: row i holds the value number codes[i], or none where that is -1.

    Attributes:
        codes: one per row; for a list column a bag of codes per row.
        keys: of the distinct values, ascending, uint64.
        values: the distinct values as text, in the order of their keys.
    """

    codes: IntArray | Bags
    keys: IntArray
    values: pa.LargeStringArray


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Typed columns of consecutive rows, in the order of the schema; absent numbers are NaN."""

    label: Array
    time: Array | None
    numeric: tuple[Array, ...]
    ids: tuple[Ids, ...]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: IntArray | slice) -> Chunk:
        """Return the rows at `rows`; the dictionaries stay as they are."""
        return Chunk(
            label=self.label[rows],
            time=None if self.time is None else self.time[rows],
            numeric=tuple(column[rows] for column in self.numeric),
            ids=tuple(
                Ids(codes=take_codes(column.codes, rows), keys=column.keys, values=column.values) for column in self.ids
            ),
        )


def take_codes(codes: IntArray | Bags, rows: IntArray | slice) -> IntArray | Bags:
    """Return the codes, or the bags of codes, at `rows`."""
    if not isinstance(codes, Bags):
        return codes[rows]
    if isinstance(rows, slice):
        offsets = codes.offsets[rows.start : rows.stop + 1]
        return Bags(offsets=offsets - offsets[0], values=codes.values[offsets[0] : offsets[-1]])
    counts = np.diff(codes.offsets)[rows]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(offsets[-1]) + np.repeat(codes.offsets[rows] - offsets[:-1], counts)
    return Bags(offsets=offsets, values=codes.values[places])


def encode_values(column: pa.Array) -> Ids:
    """Give the texts of a column (strings, perhaps dictionary-encoded) codes in the order of their keys."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    values = encoded.dictionary.cast(pa.large_string())
    texts = values.cast(pa.large_binary()).to_pylist()
    there = np.fromiter(map(bool, texts), dtype=bool, count=len(texts))
    hashed = np.fromiter((xxhash.xxh64_intdigest(text) for text in texts if text), dtype=np.uint64, count=there.sum())
    keys, first, inverse = np.unique(hashed, return_index=True, return_inverse=True)
    rank = np.full(len(texts) + 1, MISSING_CODE, dtype=np.int32)
    rank[:-1][there] = inverse
    indices = encoded.indices.fill_null(len(texts)) if encoded.null_count else encoded.indices
    codes = rank[indices.to_numpy(zero_copy_only=False)]
    return Ids(codes=_narrow(codes, len(keys)), keys=keys, values=values.take(pa.array(np.flatnonzero(there)[first])))


def _narrow(codes: IntArray, count: int) -> IntArray:
    """Store codes in as few bytes as hold `count` of them: most columns have few distinct values in a chunk."""
    dtype = np.int8 if count < 1 << 7 else np.int16 if count < 1 << 15 else np.int32
    return codes.astype(dtype, copy=False)


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Return the rows of several chunks as one, with common dictionaries."""
    times = [chunk.time for chunk in chunks if chunk.time is not None]
    return Chunk(
        label=np.concatenate([chunk.label for chunk in chunks]),
        time=np.concatenate(times) if times else None,
        numeric=tuple(np.concatenate(columns) for columns in zip(*(chunk.numeric for chunk in chunks), strict=True)),
        ids=tuple(_join_ids(columns) for columns in zip(*(chunk.ids for chunk in chunks), strict=True)),
    )


def _join_ids(columns: Sequence[Ids]) -> Ids:
    used = [np.unique(flat_codes(column.codes)) for column in columns]
    used = [here[here != MISSING_CODE] for here in used]
    keys, first, inverse = np.unique(
        np.concatenate([column.keys[here] for column, here in zip(columns, used, strict=True)]),
        return_index=True,
        return_inverse=True,
    )
    values = pa.concat_arrays([column.values.take(pa.array(here)) for column, here in zip(columns, used, strict=True)])
    flat, place = [], 0
    for column, here in zip(columns, used, strict=True):
        rank = np.full(len(column.keys) + 1, MISSING_CODE, dtype=np.int32)
        rank[here] = inverse[place : place + len(here)]
        flat.append(rank[flat_codes(column.codes)])
        place += len(here)
    codes = _narrow(np.concatenate(flat), len(keys))
    joined: IntArray | Bags = codes
    if isinstance(columns[0].codes, Bags):
        counts = [np.diff(column.codes.offsets) for column in columns if isinstance(column.codes, Bags)]
        joined = Bags(offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]), values=codes)
    return Ids(codes=joined, keys=keys, values=values.take(pa.array(first)))


def flat_codes(codes: IntArray | Bags) -> IntArray:
    """Return all codes of a column, those of lists one after the other."""
    return codes.values if isinstance(codes, Bags) else codes


def write_chunk(folder: Path, chunk: Chunk) -> None:
    """Write a chunk so that its folder is there whole or not at all."""
    columns: dict[str, pa.Array] = {"label": pa.array(chunk.label)}
    if chunk.time is not None:
        columns["time"] = pa.array(chunk.time)
    for index, numbers in enumerate(chunk.numeric):
        columns[f"numeric:{index}"] = pa.array(_shorten(numbers))
    for index, ids in enumerate(chunk.ids):
        columns[f"ids:{index}"] = (
            pa.LargeListArray.from_arrays(pa.array(ids.codes.offsets.astype(np.int64)), pa.array(ids.codes.values))
            if isinstance(ids.codes, Bags)
            else pa.array(ids.codes)
        )
    values = [pa.record_batch([pa.array(ids.keys), ids.values], schema=VALUES_SCHEMA) for ids in chunk.ids]
    facts = {"rows": len(chunk), "time_type": None if chunk.time is None else str(chunk.time.dtype)}
    with whole_folder(folder) as scratch:
        write_batches(scratch / ROWS, [pa.record_batch(columns)])
        write_batches(scratch / VALUES, values)
        (scratch / FACTS).write_text(json.dumps(facts))


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that lie in a folder of the work."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def _shorten(numbers: Array) -> Array:
    """Return the numbers as float32 where that loses nothing."""
    with np.errstate(over="ignore"):
        short = numbers.astype(np.float32)
    return short if np.array_equal(short.astype(np.float64), numbers, equal_nan=True) else numbers


def read_chunk(folder: Path) -> Chunk:
    """Return a chunk's columns as views of its memory-mapped files."""
    rows = next(read_batches(folder / ROWS))
    numbers = {name: rows.column(name) for name in rows.schema.names}
    values = list(read_batches(folder / VALUES))
    return Chunk(
        label=numbers["label"].to_numpy(),
        time=numbers["time"].to_numpy() if "time" in numbers else None,
        numeric=tuple(column.to_numpy() for name, column in numbers.items() if name.startswith("numeric:")),
        ids=tuple(
            Ids(codes=_codes(numbers[f"ids:{index}"]), keys=batch.column(0).to_numpy(), values=batch.column(1))
            for index, batch in enumerate(values)
        ),
    )


def _codes(column: Any) -> IntArray | Bags:
    if isinstance(column, pa.LargeListArray):
        return Bags(offsets=column.offsets.to_numpy(), values=column.values.to_numpy())
    codes: IntArray = column.to_numpy()
    return codes


def write_batches(path: Path, batches: Sequence[pa.RecordBatch]) -> None:
    """Write an Arrow file."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(path: Path, wanted: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow file, or the wanted ones of them, memory-mapped."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    for index in range(reader.num_record_batches) if wanted is None else wanted:
        yield reader.get_batch(index)
