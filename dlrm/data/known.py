"""Schemas of data sets that many people use, so that nobody has to write them again."""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, get_args

from dlrm.data import criteo
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig, Transform

KnownSource = Literal["criteo-kaggle", "criteo-terabyte", "criteo-kaggle-sample", "movielens-100k"]

KAGGLE_DAYS, TERABYTE_DAYS = 7, 24
TERABYTE_MAX_ROWS = 40_000_000  # of one table, as in MLPerf Training's DLRM benchmark


def criteo_schema(
    *,
    min_count: int = 2,
    num_rows: int | None = None,
    transform: Transform = "log1p_standardise",
    missing_indicator: bool = False,
    buckets: int = 0,
    valid: float = 0.0,
    test: float = 0.2,
) -> DataSchema:
    """Return the schema of a Criteo log; its rows are in chronological order.

    Args:
        min_count: ids seen less often in the training part share a row.
        num_rows: of a table, at most.
        transform: of the 13 counts.
        missing_indicator: whether the model is told which counts are absent.
        buckets: of each count, as a further feature; 0 for none.
        valid: share of all rows between training and test part.
        test: share of all rows at the end.
    """
    return DataSchema(
        format="criteo",
        label=criteo.LABEL,
        numeric=tuple(
            NumericColumn(name=name, transform=transform, missing_indicator=missing_indicator, buckets=buckets)
            for name in criteo.NUMERIC
        ),
        categorical=tuple(
            CategoricalColumn(name=name, min_count=min_count, num_rows=num_rows) for name in criteo.CATEGORICAL
        ),
        split=SplitConfig(by="order", valid=valid, test=test),
    )


def movielens_schema(
    *, leave_out: Container[str] = (), item_min_count: int = 1, valid: float = 0.0, test: float = 0.2
) -> DataSchema:
    """Return the schema of MovieLens-100K with user and item attributes: a click is a rating of 4 or 5.

    Args:
        leave_out: columns that are not to become features.
        item_min_count: items rated less often in the training part share a row.
        valid: share of all rows, in time between training and test part.
        test: share of all rows, the latest.
    """
    names = ("user_id", "item_id", "age", "gender", "occupation", "zip_code", "release_year")
    min_counts = {"item_id": item_min_count}
    single = [CategoricalColumn(name=name, min_count=min_counts.get(name, 1)) for name in names]
    genres = CategoricalColumn(name="class", min_count=1, is_list=True, separator=" ")
    return DataSchema(
        format="movielens",
        label="rating",
        label_threshold=4.0,
        time="timestamp",
        categorical=tuple(column for column in (*single, genres) if column.name not in leave_out),
        split=SplitConfig(by="time", valid=valid, test=test),
    )


def known_schema(source: str) -> DataSchema:
    """Return the schema of a recipe's source.

    - `criteo-kaggle`: seven days; six train, halves of the seventh validate and test.
    - `criteo-terabyte`: day_0 ... day_23; the last one validates and tests.
    - `criteo-kaggle-sample`: 10,000 rows; the first 8,000 train, the last 2,000 test.
    - `movielens-100k`: the latest fifth tests.

    Raises:
        ValueError: there is no such source.
    """
    if source not in get_args(KnownSource):
        raise ValueError(f"expected one of {', '.join(get_args(KnownSource))}, got '{source}'")
    if source == "criteo-kaggle":
        return criteo_schema(min_count=8, valid=0.5 / KAGGLE_DAYS, test=0.5 / KAGGLE_DAYS)
    if source == "criteo-terabyte":
        half_day = 0.5 / TERABYTE_DAYS
        return criteo_schema(min_count=8, num_rows=TERABYTE_MAX_ROWS, valid=half_day, test=half_day)
    if source == "criteo-kaggle-sample":
        return criteo_schema(min_count=8, missing_indicator=True, buckets=8)
    # On later users, most of them new, what is left out costs AUC, and items that are rarely rated are rated alike.
    return movielens_schema(leave_out=("age", "zip_code", "release_year"), item_min_count=5)
