"""Writes what was inferred of a source as a short configuration with remarks; `load_config` reads it back as it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dlrm.data.first_settings import choose_settings
from dlrm.data.infer import Inference
from dlrm.data.schema import CategoricalColumn, NumericColumn

NOTE_COLUMN = 44


def write_config(inference: Inference, sources: Sequence[Path | str], path: Path | str) -> None:
    """Write a configuration file, which `recforge prepare` and `recforge train` take.

    Raises:
        ValueError: the file exists, or cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"--output: expected a new file, {path} exists; delete it, or choose another")
    text = format_config(inference, sources, path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        path.unlink(missing_ok=True)  # a part of it would stand in the way of the next attempt
        raise ValueError(f"--output: {path} cannot be written ({error.strerror}); choose another place") from error


def format_config(inference: Inference, sources: Sequence[Path | str], path: Path) -> str:
    """Return the text of a configuration file that will lie at `path`."""
    schema, notes = inference.schema, inference.notes
    folder = path.resolve().parent
    places = [os.path.relpath(Path(source).resolve(), folder) for source in sources]
    lines = [
        f"# Written by `recforge init`, which looked at the first {inference.rows:,} rows. Correct it, then",
        f"#     recforge train {path.name}      or, to prepare the data only,      recforge prepare {path.name} OUT",
        "",
        "[data]",
        _line(
            "source", json.dumps(places, ensure_ascii=False), "files, folders or globs, seen from this file's folder"
        ),
        _line("format", json.dumps(schema.format), "csv, tsv, parquet, criteo or movielens"),
        _line("label", json.dumps(schema.label), notes.get(schema.label, "")),
    ]
    if schema.label_threshold is not None:
        lines.append(_line("label_threshold", f"{schema.label_threshold:g}", "the label is 1 from here on"))
    if schema.time is not None:
        lines.append(_line("time", json.dumps(schema.time), notes.get(schema.time, "")))
    split = schema.split
    order = "the oldest rows train, the latest test" if split.by == "time" else "the source is in chronological order"
    lines.append(_line("split", f'{{by = "{split.by}", valid = {split.valid:g}, test = {split.test:g}}}', order))
    if schema.numeric:
        lines += ["", "[data.numeric]  # none, log1p, standardise, log1p_standardise or quantile"]
        lines += [_line(_key(column.name), _number(column), notes.get(column.name, "")) for column in schema.numeric]
    lines += ["", '[data.categorical]  # "dictionary", {min_count = 10} or {ids = "hash", num_rows = 100000}']
    lines += [_line(_key(column.name), _ids(column), notes.get(column.name, "")) for column in schema.categorical]
    if inference.dropped:
        lines += ["", "# Left out:"]
        lines += [f"#     {name}: {reason}" for name, reason in inference.dropped.items()]
    return "\n".join([*lines, "", *_train(inference.training_rows), ""])


def _train(training_rows: int) -> list[str]:
    settings = choose_settings(training_rows)
    steps = max(training_rows // settings.batch_size, 1)
    tables = f"{{learning_rate = {settings.learning_rate:g}, eps = {settings.eps:g}}}"
    return [
        f"[train]  # a start for about {training_rows:,} training rows; the best epoch on the valid rows is kept",
        _line("epochs", f"{settings.epochs}", f"of {steps:,} steps"),
        _line("step", f"{{global_batch_size = {settings.batch_size}}}", "samples"),
        _line("tables", tables, "of row-wise Adagrad, which updates the rows"),
    ]


def _line(key: str, value: str, note: str) -> str:
    setting = f"{key} = {value}"
    note = " ".join(note.split())
    return f"{setting:{NOTE_COLUMN}}  # {note}" if note else setting


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _number(column: NumericColumn) -> str:
    if not column.missing_indicator:
        return json.dumps(column.transform)
    return f'{{transform = "{column.transform}", missing_indicator = true}}'


def _ids(column: CategoricalColumn) -> str:
    settings = []
    if column.ids == "hash":
        settings.append(f'ids = "hash", num_rows = {column.num_rows}')
    if column.is_list:
        settings.append("is_list = true")
    if column.separator is not None:
        settings.append(f"separator = {json.dumps(column.separator)}")
    return f"{{{', '.join(settings)}}}" if settings else '"dictionary"'
