"""The beginning of `prepare`: from source files to chunks in the order of the events, and the cuts between splits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.chunk import join_chunks, read_chunk, write_chunk
from dlrm.data.formats import BlockParser, Source, plan_blocks
from dlrm.data.parse import ParseTask, chunk_folder, parse_block
from dlrm.data.schema import DataSchema
from dlrm.data.splits import ChunkTimes, Cuts, cut_by_order, cut_by_time
from dlrm.data.tabular import Wanted
from dlrm.data.work import Workers, whole_file


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """All rows of the source.

    Attributes:
        chunks: their folders, in the order of the events.
        rows: of each chunk.
        cuts: between train, valid and test.
        time_type: of the time column.
    """

    chunks: tuple[Path, ...]
    rows: tuple[int, ...]
    cuts: Cuts
    time_type: str


def ingest(schema: DataSchema, source: Source, work: Path, block_bytes: int, workers: Workers) -> Ingested:
    """Parse the source, and sort it where the split is by time and it is not sorted yet.

    Raises:
        ValueError: the source is damaged, does not fit the schema or is empty, or a split would be empty.
    """
    facts = _parse(schema, source, work, block_bytes, workers)
    rows = [fact["rows"] for fact in facts]
    if not sum(rows):
        raise ValueError(f"expected rows in {', '.join(map(str, source.files))}, found none; check the source")
    chunks = [chunk_folder(work / "chunks", index) for index in range(len(facts))]
    time_type = "float64" if any(fact.get("time_type") == "float64" for fact in facts) else "int64"
    if schema.split.by == "order":
        cuts = cut_by_order(sum(rows), schema.split)
    else:
        times = _gather_times(chunks, rows, time_type, work / "times.bin")
        cuts = cut_by_time(times, schema.split)
        if not times.is_sorted:
            chunks, rows = _sort(chunks, times, work / "sorted", workers)
    return Ingested(chunks=tuple(chunks), rows=tuple(rows), cuts=cuts, time_type=time_type)


def _parse(schema: DataSchema, source: Source, work: Path, block_bytes: int, workers: Workers) -> list[dict[str, Any]]:
    """Parse the source into chunks and return their facts; once that is done, the source is not read again."""
    marker = work / "chunks.json"
    if not marker.is_file():
        found: dict[int, dict[str, Any]] = {}
        share, rows = 0.0, 0
        workers.progress("parse", 0.0, 0)
        tasks = _plan_parsing(schema, source, work, block_bytes)
        for task, facts in workers.run(parse_block, tasks):
            found |= {task.block.index + place: fact for place, fact in enumerate(facts)}
            share, rows = share + task.block.share, rows + sum(fact["rows"] for fact in facts)
            workers.progress("parse", min(share, 1.0), rows)
        with whole_file(marker) as scratch:
            scratch.write_text(json.dumps([found[index] for index in sorted(found)]))
        workers.progress("parse", 1.0, rows)
    chunks: list[dict[str, Any]] = json.loads(marker.read_text())
    return chunks


def _plan_parsing(schema: DataSchema, source: Source, work: Path, block_bytes: int) -> Iterator[ParseTask]:
    wanted, chunks = Wanted.of(schema), work / "chunks"
    parser = BlockParser(wanted=wanted, joined=source.joined)
    blocks = plan_blocks(
        source,
        wanted,
        block_bytes=block_bytes,
        scratch=work / "text",
        is_done=lambda index: chunk_folder(chunks, index).is_dir(),
    )
    for block in blocks:
        yield ParseTask(block=block, parser=parser, schema=schema, chunks=chunks)


def _gather_times(chunks: Sequence[Path], rows: Sequence[int], time_type: str, path: Path) -> ChunkTimes:
    """Put the chunks' times into one memory-mapped file: a process may not map each chunk of a long log."""
    if not path.is_file():
        with whole_file(path) as scratch, scratch.open("wb") as file:
            for chunk in chunks:
                times = read_chunk(chunk).time
                assert times is not None
                file.write(times.astype(time_type).tobytes())
    return ChunkTimes(np.memmap(path, dtype=time_type, mode="r"), np.cumsum([0, *rows]))


@dataclass(frozen=True, kw_only=True)
class SortTask:
    """Make one chunk of slices of several."""

    pieces: tuple[tuple[Path, int, int], ...]
    out: Path


def _sort(chunks: Sequence[Path], times: ChunkTimes, folder: Path, workers: Workers) -> tuple[list[Path], list[int]]:
    """Sort all rows by time into as many chunks of equal size; each task merges slices of the chunks."""
    bounds = np.linspace(0, times.rows, len(chunks) + 1).round().astype(np.int64)
    tasks = [
        SortTask(
            pieces=tuple((chunks[chunk], start, stop) for chunk, start, stop in pieces),
            out=chunk_folder(folder, index),
        )
        for index, pieces in enumerate(times.pieces(bounds))
    ]
    workers.run_stage("sort", sort_pieces, tasks, total_rows=times.rows, count_rows=_count_rows)
    return [task.out for task in tasks], [_count_rows(task) for task in tasks]


def _count_rows(task: SortTask) -> int:
    return sum(stop - start for _, start, stop in task.pieces)


def sort_pieces(task: SortTask) -> None:
    """Merge slices of chunks, sorted by time; equal times keep the order of the source."""
    if not task.out.is_dir():
        joined = join_chunks([read_chunk(folder).take(slice(start, stop)) for folder, start, stop in task.pieces])
        assert joined.time is not None
        write_chunk(task.out, joined.take(np.argsort(joined.time, kind="stable")))
