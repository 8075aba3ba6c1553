"""What a user says of a data source: which columns are label, time, numbers and ids, and how each is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SourceFormat = Literal["csv", "tsv", "parquet", "criteo", "movielens"]
Transform = Literal["none", "log1p", "standardise", "log1p_standardise", "quantile"]

OUT_OF_VOCABULARY_ROW = 0
MISSING_ROW = 1
FIRST_ID_ROW = 2


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """A column of numbers; what the transform needs is fitted on the training part only.

    Attributes:
        name: column in the source.
        transform: `log1p` is sign(x) * log(1 + |x|); `quantile` maps to the rank in [0, 1] among training values.
        missing_indicator: add a second column, `<name>:missing`, that is 1 where the value is absent.
        buckets: also a feature, `<name>:bucket`, whose ids are so many buckets of equally many training values; it lets
            a linear part of the model follow any curve. 0 makes none.
    """

    name: str
    transform: Transform = "log1p_standardise"
    missing_indicator: bool = False
    buckets: int = 0

    def __post_init__(self) -> None:
        if self.buckets < 0 or self.buckets == 1:
            raise ValueError(f"numeric '{self.name}': expected buckets = 0 or at least 2, got {self.buckets}")


@dataclass(frozen=True, kw_only=True)
class CategoricalColumn:
    """A column of ids; row 0 of its table is for ids out of vocabulary, row 1 for absent values.

    Attributes:
        name: column in the source.
        ids: `dictionary` gives each frequent training value a row of its own; `hash` needs no pass over the data.
        min_count: dictionary only: values seen less often in the training part share row 0.
        num_rows: rows of the table, rows 0 and 1 included; required by `hash`, and for `dictionary` the most there may
            be: the most frequent values are kept.
        is_list: each cell holds any number of ids (a list column, or text split at `separator`).
        separator: what separates the ids of a text cell; None for real list columns.
    """

    name: str
    ids: Literal["dictionary", "hash"] = "dictionary"
    min_count: int = 2
    num_rows: int | None = None
    is_list: bool = False
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.ids == "hash" and self.num_rows is None:
            raise ValueError(f"categorical '{self.name}': expected num_rows beside ids='hash', got none")
        if self.num_rows is not None and self.num_rows <= FIRST_ID_ROW:
            raise ValueError(f"categorical '{self.name}': expected num_rows > {FIRST_ID_ROW}, got {self.num_rows}")
        if self.min_count < 1:
            raise ValueError(f"categorical '{self.name}': expected min_count >= 1, got {self.min_count}")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How rows are divided: the oldest train, the newest test, always without overlap in time.

    Attributes:
        by: `time` cuts at values of the schema's time column; `order` takes the source's own order as chronological.
        valid: share of all rows between training and test part.
        test: share of all rows at the end.
    """

    by: Literal["time", "order"] = "order"
    valid: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if self.valid < 0 or self.test < 0 or self.valid + self.test >= 1:
            raise ValueError(
                f"split: expected valid >= 0, test >= 0 and valid + test < 1, got valid={self.valid}, test={self.test}"
            )


@dataclass(frozen=True, kw_only=True)
class DataSchema:
    """Everything `prepare` needs to know of a source.

    Attributes:
        format: how the files are parsed.
        label: column that holds 0 / 1, or a number if `label_threshold` is set.
        label_threshold: the label is 1 where the column is at least this.
        time: column that orders events; any number or timestamp.
        numeric: columns of numbers, in the order of the model's dense input.
        categorical: columns of ids, one feature each.
        split: sizes of the parts.
    """

    format: SourceFormat
    label: str
    label_threshold: float | None = None
    time: str | None = None
    numeric: tuple[NumericColumn, ...] = ()
    categorical: tuple[CategoricalColumn, ...] = ()
    split: SplitConfig = SplitConfig()

    def __post_init__(self) -> None:
        names = [column.name for column in self.numeric] + [column.name for column in self.categorical]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"schema: expected each column once, got {', '.join(twice)} twice")
        reserved = {"label", "numeric"} | ({"time"} if self.time else set())
        taken = sorted(reserved & {column.name for column in self.categorical})
        if taken:
            raise ValueError(f"schema: expected other categorical columns than {', '.join(taken)}: rename the column")
        if self.label in names:
            raise ValueError(f"schema: the label '{self.label}' is also a feature; remove it from the features")
        if not self.categorical:
            raise ValueError("schema: expected at least one categorical column, got none")
        if self.split.by == "time" and self.time is None:
            raise ValueError("schema: split.by='time' expects a time column, got none; set `time` or split.by='order'")
