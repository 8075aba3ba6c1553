"""Dictionaries of ids: counted in the training part chunk by chunk, merged by ranges of keys, cut by count and size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm.data.chunk import (
    FACTS,
    MISSING_CODE,
    VALUES,
    Ids,
    flat_codes,
    read_batches,
    read_chunk,
    read_facts,
    write_batches,
)
from dlrm.data.dataset import IntArray
from dlrm.data.exact_sum import Moments
from dlrm.data.numeric import measure_column, sample_rows
from dlrm.data.schema import FIRST_ID_ROW, OUT_OF_VOCABULARY_ROW, CategoricalColumn, DataSchema
from dlrm.data.work import whole_file, whole_folder

ENTRIES_PER_RANGE = 1 << 20
COUNTS_SCHEMA = pa.schema([("key", pa.uint64()), ("count", pa.int64()), ("value", pa.large_string())])
LOOKUP_SCHEMA = pa.schema([("key", pa.uint64()), ("row", pa.int64())])
VOCABULARY, SAMPLES = "vocabulary", "samples.npy"


@dataclass(frozen=True, kw_only=True)
class CountTask:
    """Count training rows of a few chunks: the first `rows` of each, which begin at number `first_row` of all.

    Attributes:
        chunks: (folder, rows, first_row) of each.
        out: folder for the counts.
        training_rows: of the whole training part.
        schema: of the data.
    """

    chunks: tuple[tuple[Path, int, int], ...]
    out: Path
    training_rows: int
    schema: DataSchema

    @property
    def rows(self) -> int:
        """The rows that are counted."""
        return sum(rows for _, rows, _ in self.chunks)


def count_chunks(task: CountTask) -> dict[str, Any]:
    """Count values and measure numbers; return the facts, which also lie in the task's folder."""
    if task.out.is_dir():
        return read_facts(task.out)
    counts: list[list[pa.RecordBatch]] = [[] for _ in task.schema.categorical]
    moments = [Moments() for _ in task.schema.numeric]
    samples, clicks = [], 0
    for folder, rows, first_row in task.chunks:
        chunk = read_chunk(folder).take(slice(0, rows))
        for found, ids in zip(counts, chunk.ids, strict=True):
            found.append(_count_ids(ids))
        clicks += int(chunk.label.sum())
        columns = zip(task.schema.numeric, chunk.numeric, moments, strict=True)
        moments = [before + measure_column(config, numbers) for config, numbers, before in columns]
        sampled = sample_rows(first_row, rows, task.training_rows)
        numbers = [column[sampled].astype(np.float64) for column in chunk.numeric]
        samples.append(np.stack(numbers) if numbers else np.empty((0, 0)))
    present = [int(sum(pc.sum(batch.column(1)).as_py() or 0 for batch in found)) for found in counts]
    batches = [
        _add_up(found if config.ids == "dictionary" else [])[0]
        for config, found in zip(task.schema.categorical, counts, strict=True)
    ]
    entries = [len(batch) for batch in batches]
    facts = {"rows": task.rows, "clicks": clicks, "entries": entries, "present": present}
    facts["moments"] = [each.to_json() for each in moments]
    with whole_folder(task.out) as scratch:
        write_batches(scratch / VALUES, batches)
        np.save(scratch / SAMPLES, np.concatenate(samples, axis=1))
        (scratch / FACTS).write_text(json.dumps(facts))
    return facts


def _count_ids(ids: Ids) -> pa.RecordBatch:
    codes = flat_codes(ids.codes)
    counts = np.bincount(codes[codes != MISSING_CODE], minlength=len(ids.keys))
    seen = np.flatnonzero(counts)
    columns = [pa.array(ids.keys[seen]), pa.array(counts[seen]), ids.values.take(pa.array(seen))]
    return pa.record_batch(columns, schema=COUNTS_SCHEMA)


def _add_up(batches: Sequence[pa.RecordBatch], min_count: int = 1) -> tuple[pa.RecordBatch, int]:
    """Return each key once, ascending, with its sum of counts if that is at least `min_count`; and how many keys."""
    table = pa.Table.from_batches(batches, schema=COUNTS_SCHEMA)
    keys, first, inverse = np.unique(table.column("key").to_numpy(), return_index=True, return_inverse=True)
    counts = np.bincount(inverse, weights=table.column("count").to_numpy(), minlength=len(keys)).astype(np.int64)
    kept = np.flatnonzero(counts >= min_count)
    values = table.column("value").take(pa.array(first[kept])).combine_chunks()
    columns = [pa.array(keys[kept]), pa.array(counts[kept]), values]
    return pa.record_batch(columns, schema=COUNTS_SCHEMA), len(keys)


@dataclass(frozen=True, kw_only=True)
class RangeTask:
    """Add up the counts of a feature's keys in [first, last]; there are about `entries` of them in the chunks."""

    counts: tuple[Path, ...]
    feature: int
    min_count: int
    first: int
    last: int
    entries: int
    out: Path


def plan_ranges(schema: DataSchema, counts: Sequence[Path], entries: Sequence[int], out: Path) -> Iterator[RangeTask]:
    """Yield tasks that cover every dictionary's keys; each range holds a bounded number of entries of the chunks."""
    for feature, config in enumerate(schema.categorical):
        if config.ids == "dictionary":
            ranges = max(1, -(-entries[feature] // ENTRIES_PER_RANGE))
            bounds = [(1 << 64) * place // ranges for place in range(ranges + 1)]
            for index, (first, end) in enumerate(pairwise(bounds)):
                yield RangeTask(
                    counts=tuple(counts),
                    feature=feature,
                    min_count=config.min_count,
                    first=first,
                    last=end - 1,
                    entries=entries[feature] // ranges,
                    out=range_folder(out, feature) / f"{index:06d}.arrow",
                )


def range_folder(out: Path, feature: int) -> Path:
    """Return where the counts of a feature's ranges of keys lie."""
    return out / f"{feature:04d}"


def add_range(task: RangeTask) -> int:
    """Add up a range of keys over all chunks, keep what is frequent enough, and return the number of distinct keys."""
    facts = task.out.with_suffix(".json")
    if facts.is_file():
        return int(json.loads(facts.read_text())["distinct"])
    pieces = []
    for folder in task.counts:
        batch = next(read_batches(folder / VALUES, [task.feature]))
        keys = batch.column(0).to_numpy()
        start = int(np.searchsorted(keys, np.uint64(task.first), side="left"))
        stop = int(np.searchsorted(keys, np.uint64(task.last), side="right"))
        if start < stop:
            pieces.append(batch.slice(start, stop - start))
    sums, distinct = _add_up(pieces, task.min_count)
    with whole_file(task.out) as scratch:
        write_batches(scratch, [sums])
    with whole_file(facts) as scratch:
        scratch.write_text(json.dumps({"distinct": distinct}))
    return distinct


@dataclass(frozen=True, kw_only=True)
class DictionaryTask:
    """Order a feature's values and give them rows."""

    feature: int
    config: CategoricalColumn
    ranges: tuple[Path, ...]
    lookup: Path
    out: Path


def vocabulary_file(folder: Path, name: str) -> Path:
    """Return where a dataset keeps a feature's dictionary: value and count of row 2, 3, ... of its table."""
    return folder / VOCABULARY / f"{quote(name, safe=' ')}.arrow"


def build_dictionary(task: DictionaryTask) -> tuple[int, int]:
    """Write a feature's dictionary, the most frequent value first; return the number of values and the sum of counts.

    Equal counts are ordered by value, so that the rows depend on the training part alone.
    """
    facts = task.lookup.with_suffix(".json")
    if facts.is_file():
        kept, kept_ids = json.loads(facts.read_text())
        return int(kept), int(kept_ids)
    table = pa.Table.from_batches([batch for path in task.ranges for batch in read_batches(path)], COUNTS_SCHEMA)
    order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("value", "ascending")])
    if task.config.num_rows is not None:
        order = order[: task.config.num_rows - FIRST_ID_ROW]
    table = table.take(order).combine_chunks()
    by_key = np.argsort(table.column("key").to_numpy())
    columns = [pa.array(table.column("key").to_numpy()[by_key]), pa.array(by_key + FIRST_ID_ROW)]
    with whole_file(task.lookup) as scratch:
        write_batches(scratch, [pa.record_batch(columns, schema=LOOKUP_SCHEMA)])
    values = table.select(["value", "count"])
    with whole_file(task.out) as scratch:
        write_batches(scratch, values.to_batches() or [pa.RecordBatch.from_pylist([], schema=values.schema)])
    kept, kept_ids = len(table), int(table.column("count").to_numpy().sum())
    with whole_file(facts) as scratch:
        scratch.write_text(json.dumps([kept, kept_ids]))
    return kept, kept_ids


def find_rows(config: CategoricalColumn, lookup: Path, keys: IntArray) -> IntArray:
    """Return the table row of each key: its place in the dictionary, or 0; by hashing, 2 + key mod (num_rows - 2)."""
    if config.ids == "hash":
        assert config.num_rows is not None
        hashed: IntArray = (keys % np.uint64(config.num_rows - FIRST_ID_ROW)).astype(np.int64) + FIRST_ID_ROW
        return hashed
    batch = next(read_batches(lookup))
    known, rows = batch.column(0).to_numpy(), batch.column(1).to_numpy()
    if not len(known):
        return np.full(len(keys), OUT_OF_VOCABULARY_ROW)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, rows[place], OUT_OF_VOCABULARY_ROW)
