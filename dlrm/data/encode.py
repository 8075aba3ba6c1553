"""From chunks to the parts of a dataset: keys become rows of tables, numbers are transformed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.chunk import Chunk, Ids, read_chunk, take_codes
from dlrm.data.dataset import Array, Bags, FeatureInfo, IntArray, Part, write_part
from dlrm.data.numeric import FittedTransform
from dlrm.data.schema import MISSING_ROW, DataSchema
from dlrm.data.splits import Piece
from dlrm.data.vocabulary import find_rows
from dlrm.data.work import whole_file


@dataclass(frozen=True, kw_only=True)
class EncodeTask:
    """Encode the pieces of a chunk; `lookups` holds a file per feature."""

    chunk: Path
    pieces: tuple[Piece, ...]
    schema: DataSchema
    features: tuple[FeatureInfo, ...]
    transforms: tuple[FittedTransform, ...]
    lookups: tuple[Path, ...]
    time_type: str
    dataset: Path
    out: Path


def encode_chunk(task: EncodeTask) -> list[dict[str, Any]]:
    """Write a chunk's parts and return what the dataset's description says of each; the task's file holds the same."""
    if task.out.is_file():
        facts: list[dict[str, Any]] = json.loads(task.out.read_text())
        return facts
    chunk = read_chunk(task.chunk)
    ids = [_encode(task, feature, column) for feature, column in enumerate(chunk.ids)]
    facts = []
    for piece in task.pieces:
        rows = slice(piece.start, piece.stop)
        extra: dict[str, Array] = {}
        if chunk.time is not None:
            extra["time"] = chunk.time[rows].astype(task.time_type)
        part = Part(
            label=chunk.label[rows],
            numeric=_transform(chunk, task.transforms, rows),
            features=_take_features(task, chunk, ids, rows),
            extra=extra,
        )
        info = write_part(task.dataset, piece.split, piece.part, part)
        clicks = int(part.label.sum())
        facts.append({"split": piece.split, "part": piece.part, "clicks": clicks, "info": asdict(info)})
    with whole_file(task.out) as scratch:
        scratch.write_text(json.dumps(facts))
    return facts


def _encode(task: EncodeTask, feature: int, column: Ids) -> IntArray | Bags:
    rows = find_rows(task.schema.categorical[feature], task.lookups[feature], column.keys)
    dtype = np.int32 if task.features[feature].num_rows <= np.iinfo(np.int32).max else np.int64
    table: IntArray = np.append(rows, MISSING_ROW).astype(dtype)  # code -1, absent, finds the last entry
    if isinstance(column.codes, Bags):
        return Bags(offsets=column.codes.offsets, values=table[column.codes.values])
    return table[column.codes]


def _take_features(
    task: EncodeTask, chunk: Chunk, ids: list[IntArray | Bags], rows: slice
) -> dict[str, IntArray | Bags]:
    encoded = [take_codes(column, rows) for column in ids]
    encoded += [
        transform.find_buckets(numbers[rows])
        for transform, numbers in zip(task.transforms, chunk.numeric, strict=True)
        if transform.bucket_rows
    ]
    return {info.name: column for info, column in zip(task.features, encoded, strict=True)}


def _transform(chunk: Chunk, transforms: tuple[FittedTransform, ...], rows: slice) -> Array:
    columns = [
        column
        for transform, numbers in zip(transforms, chunk.numeric, strict=True)
        for column in transform.apply(numbers[rows])
    ]
    return np.stack(columns, axis=1) if columns else np.empty((rows.stop - rows.start, 0), dtype=np.float32)
