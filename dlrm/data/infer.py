"""Says of each column of a source whether it is label, time, number or id, by its name, type and first values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.data import criteo
from dlrm.data.cells import to_labels
from dlrm.data.column_sample import ColumnSample, find_shared_values, sample_columns
from dlrm.data.formats import PATTERNS, find_source
from dlrm.data.known import criteo_schema
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SourceFormat, SplitConfig
from dlrm.data.source import find_files, read_header

LABELS = (
    "label",
    "click",
    "clicked",
    "is_click",
    "is_clicked",
    "clk",
    "target",
    "y",
    "conversion",
    "converted",
    "like",
)
RATING = re.compile(r"rating|stars|score", re.IGNORECASE)
TIME = re.compile(r"(^|_)(time|timestamp|datetime|date|ts|unixtime|hour|day|created|created_at)($|_)", re.IGNORECASE)
IDENTITY = re.compile(
    r"(^|_)(ids?|code|zip\w*|post\w*|type|category|cat|class|gender|sex|country|city|region|state|site|app|device|user|"
    r"item|ad|campaign|brand|shop|store|seller|page|domain|os|browser|lang\w*|weekday|dow|hour|month|day|week|year|slot|"
    r"position|group|cluster|segment|flag|is|has)($|_|\d)",
    re.IGNORECASE,
)
QUANTITY = re.compile(
    r"count|num|price|cost|amount|(^|_)age($|_)|score|rate|ratio|average|avg|mean|sum|total|duration|length|size|width|"
    r"height|weight|distance|latitude|longitude|income|salary|views|visits|percent|share",
    re.IGNORECASE,
)
LIST_NAME = re.compile(r"genres?|tags?|categories|keywords?|topics?|list|ids$|history|interests?", re.IGNORECASE)
SEPARATORS = ("|", ",", ";", " ")
LOOK_AT_TEXTS = 10_000
FEW = 10  # whole numbers with so few values are taken for ids
HASH_ABOVE, HASH_ROWS = 1_000_000, 1_000_000
SKEWED = 5.0  # a range so many times as wide as the middle half asks for a logarithm


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What was found.

    Attributes:
        schema: for `prepare`.
        notes: a remark per column, for the reader of the configuration.
        dropped: columns that are left out, each with the reason.
        rows: that were looked at.
    """

    schema: DataSchema
    notes: dict[str, str]
    dropped: dict[str, str]
    rows: int


def infer_schema(sources: Sequence[Path | str], *, label: str | None = None, time: str | None = None) -> Inference:
    """Infer the schema of a source from its first rows.

    Args:
        sources: files, folders or globs, all of one format.
        label: column, if it cannot be told.
        time: column, if it cannot be told.

    Raises:
        ValueError: the format or the label cannot be told, or a named column does not exist.
    """
    paths = [Path(source) for source in sources]
    kind = detect_format(paths)
    source = find_source(kind, paths)
    samples = {sample.name: sample for sample in sample_columns(source)}
    rows = max((len(sample.values) for sample in samples.values()), default=0)
    if not rows:
        raise ValueError(f"expected rows in {', '.join(map(str, source.files))}, found none; check the source")
    if kind == "criteo":
        notes = {name: f"{sample.distinct:,} values" for name, sample in samples.items()}
        return Inference(schema=criteo_schema(valid=0.1, test=0.1), notes=notes, dropped={}, rows=rows)
    for flag, name in (("--label", label), ("--time", time)):
        if name is not None and name not in samples:
            raise ValueError(f"{flag}: expected one of {', '.join(samples)}, got '{name}'")
    label, threshold = _find_label([samples[label]] if label else list(samples.values()), named=label is not None)
    time = time or _find_time([sample for sample in samples.values() if sample.name != label])
    features = [sample for sample in samples.values() if sample.name not in (label, time)]
    return _assign(kind, label, threshold, time, features, samples, rows)


def _assign(
    kind: SourceFormat,
    label: str,
    threshold: float | None,
    time: str | None,
    features: list[ColumnSample],
    samples: dict[str, ColumnSample],
    rows: int,
) -> Inference:
    numeric, categorical, dropped = [], [], {}
    for sample in features:
        reason = _useless(sample)
        if reason:
            dropped[sample.name] = reason
        elif _is_quantity(sample):
            numeric.append(_describe_number(sample))
        else:
            categorical.append(_describe_ids(sample))
    if not categorical:
        raise ValueError(
            f"expected at least one column of ids, got the numbers {', '.join(column.name for column in numeric)} and "
            f"left out {', '.join(dropped) or 'none'}; write the schema by hand"
        )
    separators = {column.name: column.separator for column in categorical}
    notes = {sample.name: _remark(sample, separators.get(sample.name)) for sample in samples.values()}
    notes[label] = f"{_mean_label(samples[label], threshold):.1%} of the rows are clicks"
    schema = DataSchema(
        format=kind,
        label=label,
        label_threshold=threshold,
        time=time,
        numeric=tuple(numeric),
        categorical=tuple(categorical),
        split=SplitConfig(by="time" if time else "order"),
    )
    return Inference(schema=schema, notes=notes, dropped=dropped, rows=rows)


def detect_format(paths: Sequence[Path]) -> SourceFormat:
    """Return the format of a source, by names and, where they do not tell, by the first row.

    Raises:
        ValueError: it cannot be told.
    """
    files = find_files(
        paths, ("*.inter", *PATTERNS["parquet"], *criteo.PATTERNS[:2], *PATTERNS["csv"], *PATTERNS["tsv"])
    )
    file = files[0]
    suffix = file.with_suffix("").suffix if file.suffix in (".gz", ".zst") else file.suffix
    if suffix in (".inter", ".user", ".item"):
        return "movielens"
    if suffix in (".parquet", ".pq"):
        return "parquet"
    if suffix == ".csv":
        return "csv"
    cells = read_header(file, "\t", quoted=False)
    counts = cells[1 : len(criteo.NUMERIC)]
    if len(cells) in (39, 40) and all(re.fullmatch(r"-?\d*", cell) for cell in counts):
        return "criteo"
    if len(cells) > 1:
        return "tsv"
    if len(read_header(file, ",", quoted=True)) > 1:
        return "csv"
    raise ValueError(
        f"{file}: expected CSV, TSV, Parquet, Criteo or .inter files, got one column; write the schema by hand"
    )


def _find_label(samples: list[ColumnSample], *, named: bool) -> tuple[str, float | None]:
    binary = [sample for sample in samples if _is_binary(sample)]
    for wanted in LABELS:
        for sample in binary:
            if sample.name.lower() == wanted:
                return sample.name, None
    for sample in samples:
        if (RATING.search(sample.name) or named) and (threshold := _rating_threshold(sample)) is not None:
            return sample.name, threshold
    if len(binary) == 1:
        return binary[0].name, None
    found = f"found {', '.join(sample.name for sample in binary)}" if binary else "found none"
    if named:
        raise ValueError(f"--label: expected '{samples[0].name}' to hold 0 and 1 or ratings up to 5 or 10, it does not")
    raise ValueError(f"expected one column of 0 and 1, {found} among {', '.join(s.name for s in samples)}; use --label")


def _is_binary(sample: ColumnSample) -> bool:
    if sample.numbers is not None:
        return bool(np.isin(sample.numbers, (0, 1)).all())
    return sample.is_text and {text.lower() for text in sample.there.unique().to_pylist()[:9]} in (
        {"true", "false"},
        {"0", "1"},
    )


def _rating_threshold(sample: ColumnSample) -> float | None:
    numbers = sample.numbers
    if numbers is None and sample.declared == "float":
        numbers = np.array([float(text) for text in sample.there.unique().to_pylist()])
    if numbers is None or not len(numbers) or numbers.min() < 0 or numbers.max() not in (5, 10):
        return None
    return 4.0 if numbers.max() == 5 else 8.0


def _find_time(samples: list[ColumnSample]) -> str | None:
    whole = [sample for sample in samples if not sample.missing_share and (sample.is_time or TIME.search(sample.name))]
    for sample in whole:
        if sample.is_time:
            return sample.name
    for sample in whole:
        numbers = sample.numbers
        if numbers is None and sample.declared == "float":
            return sample.name
        # an hour of the day or a day of the month orders nothing
        if numbers is not None and numbers.max() > 10_000:
            return sample.name
    return None


def _useless(sample: ColumnSample) -> str | None:
    if not len(sample.there):
        return "it has no values"
    if sample.is_time:
        return "it is a second column of time"
    if sample.distinct == 1:
        return "it has one value only"
    numbers = sample.numbers is not None and not sample.is_whole
    if sample.is_unique and not sample.is_list and not numbers and not QUANTITY.search(sample.name):
        return "every row has another value"
    return None


def _is_quantity(sample: ColumnSample) -> bool:
    if sample.declared:
        return sample.declared == "float"
    if sample.numbers is None:
        return False
    if not sample.is_whole:
        return True
    if sample.distinct <= 2 or IDENTITY.search(sample.name):
        return False
    return bool(QUANTITY.search(sample.name)) or (sample.distinct > FEW and float(sample.numbers.min()) <= FEW)


def _describe_number(sample: ColumnSample) -> NumericColumn:
    numbers = sample.numbers
    skewed = True
    if numbers is not None:
        low, quarter, three_quarters, high = np.quantile(numbers, (0, 0.25, 0.75, 1))
        skewed = high - low > SKEWED * max(three_quarters - quarter, 1e-12)
    return NumericColumn(
        name=sample.name,
        transform="log1p_standardise" if skewed else "standardise",
        missing_indicator=sample.missing_share > 0.01,
    )


def _describe_ids(sample: ColumnSample) -> CategoricalColumn:
    separator = _find_separator(sample)
    many = sample.estimate_distinct() > HASH_ABOVE
    return CategoricalColumn(
        name=sample.name,
        ids="hash" if many else "dictionary",
        num_rows=HASH_ROWS if many else None,
        is_list=sample.is_list or separator is not None,
        separator=separator,
    )


def _find_separator(sample: ColumnSample) -> str | None:
    if sample.declared == "token_seq":
        return " "
    if not sample.is_text or sample.declared:
        return None
    texts = [text for text in sample.there[:LOOK_AT_TEXTS].to_pylist() if text]
    for separator in SEPARATORS:
        share, distinct, pieces = find_shared_values(texts, separator)
        by_name = bool(LIST_NAME.search(sample.name)) and share > 0.05
        by_shape = separator != " " and share > 0.2 and pieces < distinct / 2
        if by_name or by_shape:
            return separator
    return None


def _mean_label(sample: ColumnSample, threshold: float | None) -> float:
    return float(to_labels(sample.there, sample.name, threshold).mean())


def _remark(sample: ColumnSample, separator: str | None) -> str:
    missing = f", {sample.missing_share:.0%} missing" if sample.missing_share >= 0.005 else ""
    if sample.numbers is not None and not IDENTITY.search(sample.name):
        return f"{sample.numbers.min():.12g} ... {sample.numbers.max():.12g}{missing}"
    if separator is not None:
        _, _, pieces = find_shared_values(sample.there.unique().to_pylist(), separator)
        return f"{pieces:,} values in lists{missing}"
    return f"{sample.estimate_distinct():,} values{missing}"
