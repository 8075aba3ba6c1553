"""Says of each column of a source whether it is label, time, number or id, by its name, type and first values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.data import criteo
from dlrm.data.cells import to_labels
from dlrm.data.column_roles import describe_ids, describe_number, describe_sample, find_fault, find_words, is_quantity
from dlrm.data.column_sample import ColumnSample, sample_columns
from dlrm.data.formats import PATTERNS, find_source
from dlrm.data.known import criteo_schema
from dlrm.data.schema import DataSchema, SourceFormat, SplitConfig
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
RATING = frozenset(["rating", "star", "score"])
TIME = frozenset(["time", "timestamp", "datetime", "date", "ts", "unixtime", "hour", "day", "created", "at"])


@dataclass(frozen=True, kw_only=True)
class Inference:
    """What was found.

    Attributes:
        schema: for `prepare`.
        notes: a remark per column, for the reader of the configuration.
        dropped: columns that are left out, each with the reason.
        rows: that were looked at.
        all_rows: of the whole source, roughly.
    """

    schema: DataSchema
    notes: dict[str, str]
    dropped: dict[str, str]
    rows: int
    all_rows: int

    @property
    def training_rows(self) -> int:
        """The rows of the training part, roughly."""
        return round(self.all_rows * (1 - self.schema.split.valid - self.schema.split.test))


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
        schema = criteo_schema(valid=0.1, test=0.1)
        return Inference(schema=schema, notes=notes, dropped={}, rows=rows, all_rows=_estimate_rows(samples))
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
        reason = find_fault(sample)
        if reason:
            dropped[sample.name] = reason
        elif is_quantity(sample):
            numeric.append(describe_number(sample))
        else:
            categorical.append(describe_ids(sample))
    if not categorical:
        raise ValueError(
            f"expected at least one column of ids, got the numbers {', '.join(column.name for column in numeric)} and "
            f"left out {', '.join(dropped) or 'none'}; write the schema by hand"
        )
    separators = {column.name: column.separator for column in categorical}
    notes = {sample.name: describe_sample(sample, separators.get(sample.name)) for sample in samples.values()}
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
    return Inference(schema=schema, notes=notes, dropped=dropped, rows=rows, all_rows=_estimate_rows(samples))


def _estimate_rows(samples: dict[str, ColumnSample]) -> int:
    return max(round(len(sample.values) / sample.share) for sample in samples.values())


def detect_format(paths: Sequence[Path]) -> SourceFormat:
    """Return the format of a source, by names and, where they do not tell, by the first row.

    Raises:
        ValueError: it cannot be told, or the files differ in it.
    """
    files = find_files(
        paths, ("*.inter", *PATTERNS["parquet"], *criteo.PATTERNS[:2], *PATTERNS["csv"], *PATTERNS["tsv"])
    )
    kinds = {_detect_file_format(file): file for file in reversed(files)}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({file})" for kind, file in reversed(kinds.items()))
        raise ValueError(f"expected files of one format, got {found}; give each format a configuration of its own")
    return next(iter(kinds))


def _detect_file_format(file: Path) -> SourceFormat:
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
        if (RATING & find_words(sample.name) or named) and (threshold := _rating_threshold(sample)) is not None:
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
    whole = [
        sample for sample in samples if not sample.missing_share and (sample.is_time or TIME & find_words(sample.name))
    ]
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


def _mean_label(sample: ColumnSample, threshold: float | None) -> float:
    return float(to_labels(sample.there, sample.name, threshold).mean())
