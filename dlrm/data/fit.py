"""The middle of `prepare`: dictionaries and transforms, fitted to the rows of the training part alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlrm.data.dataset import FeatureInfo
from dlrm.data.exact_sum import Moments
from dlrm.data.ingest import Ingested
from dlrm.data.numeric import FittedTransform, fit_transform
from dlrm.data.parse import chunk_folder
from dlrm.data.schema import FIRST_ID_ROW, DataSchema
from dlrm.data.vocabulary import (
    SAMPLES,
    CountTask,
    DictionaryTask,
    RangeTask,
    add_range,
    build_dictionary,
    count_chunks,
    plan_ranges,
    vocabulary_file,
)
from dlrm.data.work import Workers

CHUNKS_PER_COUNT = 8  # what they have in common is added up at once, and later stages open fewer files


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the training part says.

    Attributes:
        features: with the size of each one's table.
        transforms: one per numeric column.
        lookups: one file per feature, from keys to rows; absent where ids are hashed.
        origin: what `dataset.json` keeps of the fit.
    """

    features: tuple[FeatureInfo, ...]
    transforms: tuple[FittedTransform, ...]
    lookups: tuple[Path, ...]
    origin: dict[str, Any]

    @property
    def numeric(self) -> tuple[str, ...]:
        """The names of the columns of `Batch.dense`."""
        return tuple(name for transform in self.transforms for name in transform.columns)


def fit(schema: DataSchema, ingested: Ingested, work: Path, out: Path, workers: Workers) -> Fitted:
    """Count the training rows and fit dictionaries (written to `out`) and transforms to them.

    Raises:
        ValueError: a column has no value in the training part, or the label one value only.
    """
    tasks = _plan_counting(schema, ingested, work / "counts")
    found = dict(
        workers.run_stage(
            "count", count_chunks, tasks, total_rows=ingested.cuts.train, count_rows=lambda task: task.rows
        )
    )
    counts = [found[task] for task in tasks]
    _check_labels(schema, counts)
    _check_present(schema, counts)
    transforms = _fit_transforms(schema, [task.out for task in tasks], counts)
    lookups = tuple(work / "lookups" / f"{feature:04d}.arrow" for feature in range(len(schema.categorical)))
    vocabulary = _fit_dictionaries(schema, [task.out for task in tasks], counts, lookups, work, out, workers)
    features = tuple(
        FeatureInfo(
            name=column.name,
            num_rows=facts["kept"] + FIRST_ID_ROW if column.ids == "dictionary" else column.num_rows or 0,
            is_list=column.is_list,
        )
        for column, facts in zip(schema.categorical, vocabulary, strict=True)
    ) + tuple(
        FeatureInfo(name=f"{transform.name}:bucket", num_rows=transform.bucket_rows)
        for transform in transforms
        if transform.bucket_rows
    )
    origin = {
        "fitted_rows": sum(count["rows"] for count in counts),
        "transforms": [asdict(transform) for transform in transforms],
        "vocabulary": vocabulary,
    }
    return Fitted(features=features, transforms=transforms, lookups=lookups, origin=origin)


def _plan_counting(schema: DataSchema, ingested: Ingested, folder: Path) -> list[CountTask]:
    """Return a task per few chunks that have training rows; no other row is read."""
    chunks, first = [], 0
    for chunk, rows in zip(ingested.chunks, ingested.rows, strict=True):
        if first < ingested.cuts.train:
            chunks.append((chunk, min(rows, ingested.cuts.train - first), first))
        first += rows
    groups = [tuple(chunks[place : place + CHUNKS_PER_COUNT]) for place in range(0, len(chunks), CHUNKS_PER_COUNT)]
    return [
        CountTask(chunks=group, out=chunk_folder(folder, index), training_rows=ingested.cuts.train, schema=schema)
        for index, group in enumerate(groups)
    ]


def _check_labels(schema: DataSchema, counts: Sequence[dict[str, Any]]) -> None:
    clicks, rows = (sum(count[name] for count in counts) for name in ("clicks", "rows"))
    if clicks in (0, rows):
        limit = schema.label_threshold
        setting = "label, or set label_threshold" if limit is None else f"label and label_threshold = {limit:g}"
        raise ValueError(
            f"column '{schema.label}': expected labels 0 and 1 among the training rows, got {int(clicks > 0)} in all "
            f"{rows:,}; check {setting}"
        )


def _check_present(schema: DataSchema, counts: Sequence[dict[str, Any]]) -> None:
    present = {
        column.name: sum(count["present"][place] for count in counts) for place, column in enumerate(schema.categorical)
    } | {
        column.name: sum(count["moments"][place]["count"] for count in counts)
        for place, column in enumerate(schema.numeric)
    }
    absent = [name for name, count in present.items() if not count]
    if absent:
        raise ValueError(
            f"expected values in every column, got none in any training row of {', '.join(absent)}; "
            "remove it from the schema"
        )


def _fit_transforms(
    schema: DataSchema, folders: Sequence[Path], counts: Sequence[dict[str, Any]]
) -> tuple[FittedTransform, ...]:
    fitted = []
    for place, column in enumerate(schema.numeric):
        moments = sum((Moments.from_json(count["moments"][place]) for count in counts), Moments())
        sample = np.empty(0)
        if column.transform == "quantile" or column.buckets:
            sample = np.concatenate([np.load(folder / SAMPLES)[place] for folder in folders])
        fitted.append(fit_transform(column, moments, sample[~np.isnan(sample)]))
    return tuple(fitted)


def _fit_dictionaries(
    schema: DataSchema,
    folders: Sequence[Path],
    counts: Sequence[dict[str, Any]],
    lookups: Sequence[Path],
    work: Path,
    out: Path,
    workers: Workers,
) -> list[dict[str, Any]]:
    """Build the dictionaries and return, for every feature, how many values there are and how many got a row."""
    facts: list[dict[str, Any]] = [
        {"feature": column.name, "training_ids": sum(count["present"][place] for count in counts)}
        for place, column in enumerate(schema.categorical)
    ]
    entries = [sum(count["entries"][place] for count in counts) for place in range(len(facts))]
    ranges = list(plan_ranges(schema, folders, entries, work / "ranges"))
    distinct = dict.fromkeys(range(len(facts)), 0)
    done = workers.run_stage("merge", add_range, ranges, total_rows=sum(entries), count_rows=lambda task: task.entries)
    for task, found in done:
        distinct[task.feature] += found
    orders = [
        _plan_dictionary(schema, place, ranges, lookups[place], out)
        for place, column in enumerate(schema.categorical)
        if column.ids == "dictionary"
    ]
    for order, (kept, kept_ids) in workers.run_stage(
        "order", build_dictionary, orders, total_rows=len(orders), count_rows=lambda _: 1
    ):
        facts[order.feature] |= {"distinct": distinct[order.feature], "kept": kept, "kept_ids": kept_ids}
    return facts


def _plan_dictionary(
    schema: DataSchema, feature: int, ranges: Sequence[RangeTask], lookup: Path, out: Path
) -> DictionaryTask:
    config = schema.categorical[feature]
    return DictionaryTask(
        feature=feature,
        config=config,
        ranges=tuple(task.out for task in ranges if task.feature == feature),
        lookup=lookup,
        out=vocabulary_file(out, config.name),
    )
