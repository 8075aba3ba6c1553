"""Proves on the finished parts that nothing of the validation and test rows went into what the model trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dlrm.data.chunk import flat_codes
from dlrm.data.dataset import Dataset, DatasetInfo
from dlrm.data.schema import FIRST_ID_ROW
from dlrm.data.splits import SPLITS, TRAIN
from dlrm.data.vocabulary import vocabulary_file
from dlrm.data.work import Workers

MEAN_TOLERANCE = 1e-3  # of a standardised column; float32 rounds its values


@dataclass(frozen=True, kw_only=True)
class FeatureCheck:
    """Compare a feature's dictionary with the ids of the training part."""

    folder: Path
    info: DatasetInfo
    feature: str


def check_feature(task: FeatureCheck) -> None:
    """Compare a feature's dictionary with the training part: the count of each value must be that of its row's id.

    Raises:
        ValueError: they differ.
    """
    dataset = Dataset(task.folder, task.info)
    path = vocabulary_file(dataset.folder, task.feature)
    with pa.memory_map(str(path)) as file:
        expected = pa.ipc.open_file(file).read_all().column("count").to_numpy()
        counts = np.zeros(len(expected) + FIRST_ID_ROW, dtype=np.int64)
    for index in range(len(dataset.info.splits[TRAIN])):
        ids = flat_codes(dataset.part(TRAIN, index).features[task.feature])
        if len(counts) < 4 * len(ids):
            counts += np.bincount(ids, minlength=len(counts))
        else:
            rows, times = np.unique(ids, return_counts=True)
            counts[rows] += times
    wrong = np.flatnonzero(counts[FIRST_ID_ROW:] != expected)
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{task.folder}: expected row {row + FIRST_ID_ROW} of feature '{task.feature}' {expected[row]} times in "
            f"the training part, as in its dictionary, got {counts[row + FIRST_ID_ROW]}; prepare the data again"
        )


def read_times(dataset: Dataset) -> dict[str, tuple[float, float]]:
    """Return the first and last time of each split, read from the parts; nothing if there are no times."""
    if "time" not in dataset.info.extra:
        return {}
    ranges: dict[str, tuple[float, float]] = {}
    for split in SPLITS:
        times = [dataset.part(split, index).extra["time"] for index in range(len(dataset.info.splits.get(split, ())))]
        if times:  # compared as what they are: a float cannot tell nanoseconds apart
            ranges[split] = (min(part.min().item() for part in times), max(part.max().item() for part in times))
    return ranges


def check_times(dataset: Dataset, ranges: dict[str, tuple[float, float]]) -> None:
    """Compare the times of the splits.

    Raises:
        ValueError: a split does not begin after the one before it has ended.
    """
    previous: tuple[str, float] | None = None
    for split, (first, last) in ranges.items():
        if previous and first <= previous[1]:
            raise ValueError(
                f"{dataset.folder}: expected the split '{split}' to begin after time {previous[1]}, where "
                f"'{previous[0]}' ends, got {first}; prepare the data again"
            )
        previous = (split, last)


def check_numbers(dataset: Dataset) -> None:
    """Compare the training part with the transforms: a standardised column must have mean 0 over the values it has.

    Raises:
        ValueError: it has another mean.
    """
    scaled = [fitted for fitted in dataset.info.origin["transforms"] if "standardise" in fitted["transform"]]
    totals = np.zeros(len(dataset.info.numeric))
    for index in range(len(dataset.info.splits[TRAIN]) if scaled else 0):
        totals += dataset.part(TRAIN, index).numeric.sum(axis=0, dtype=np.float64)
    for fitted in scaled:
        mean = totals[dataset.info.numeric.index(fitted["name"])] / fitted["count"]
        if abs(mean) > MEAN_TOLERANCE:
            raise ValueError(
                f"{dataset.folder}: expected column '{fitted['name']}' to have mean 0 in the training part, "
                f"got {mean}; prepare the data again"
            )


def check_leakage(dataset: Dataset, workers: Workers) -> dict[str, Any]:
    """Read the finished parts again and compare them with what was fitted; return what was found.

    Raises:
        ValueError: something of validation or test rows went into training.
    """
    ranges = read_times(dataset)
    if dataset.info.origin["schema"]["split"]["by"] == "time":
        check_times(dataset, ranges)
    rows = dataset.rows(TRAIN)
    if dataset.info.origin["fitted_rows"] != rows:
        raise ValueError(
            f"{dataset.folder}: expected a fit to {rows} training rows, got {dataset.info.origin['fitted_rows']}; "
            "prepare the data again"
        )
    tasks = [
        FeatureCheck(folder=dataset.folder, info=dataset.info, feature=column["name"])
        for column in dataset.info.origin["schema"]["categorical"]
        if column["ids"] == "dictionary"
    ]
    workers.run_stage("check", check_feature, tasks, total_rows=rows * len(tasks), count_rows=lambda _: rows)
    check_numbers(dataset)
    return {"time_ranges": ranges, "fitted_rows": rows, "dictionaries": len(tasks)}
