"""Turns Arrow columns into labels, times, numbers and ids, and says which cell does not fit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlrm.data.chunk import Ids, encode_values
from dlrm.data.dataset import Array, Bags
from dlrm.data.schema import CategoricalColumn

SECONDS = 1e-6  # of a microsecond


class BadCell(ValueError):
    """A cell that does not fit the schema; the parser, who knows the file, adds where it stands.

    Args:
        column: of the source.
        row: within the block.
        problem: "expected ..., got ..."; and what cures it.
    """

    def __init__(self, column: str, row: int, problem: str) -> None:
        super().__init__(f"column '{column}': {problem}")
        self.column, self.row, self.problem = column, row, problem


def to_labels(column: pa.Array, name: str, threshold: float | None) -> Array:
    """Return labels as uint8 0 or 1.

    Raises:
        BadCell: a label is absent, no number, or neither 0 nor 1 without a threshold.
    """
    if _is_text(column.type):
        lower = pc.utf8_lower(column)
        column = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", column))
    numbers = to_numbers(column, name)
    wanted = "0 or 1" if threshold is None else "a number"
    bad = np.isnan(numbers)
    if bad.any():
        raise BadCell(name, int(bad.argmax()), f"expected the label to be {wanted}, got nothing; remove the row")
    if threshold is not None:
        return (numbers >= threshold).astype(np.uint8)
    bad = (numbers != 0) & (numbers != 1)
    if bad.any():
        row = int(bad.argmax())
        raise BadCell(name, row, f"expected the label to be 0 or 1, got {column[row]}; set label_threshold")
    return numbers.astype(np.uint8)


def to_times(column: pa.Array, name: str) -> Array:
    """Return times as int64 (whole numbers), or as float64: other numbers, and seconds since 1970 (UTC) of timestamps.

    Raises:
        BadCell: a time is absent, or is neither a number nor a timestamp.
    """
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise BadCell(name, row, "expected a time, got nothing; remove the row, or leave `time` out of the schema")
    if _is_text(column.type):
        column = _parse_times(pc.utf8_trim_whitespace(column), name)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(column.type):
        microseconds = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64())
        return np.asarray(microseconds.to_numpy(zero_copy_only=False) * SECONDS)
    if pa.types.is_integer(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False).astype(np.int64))
    numbers = to_numbers(column, name)
    if np.isnan(numbers).any():
        raise BadCell(name, int(np.isnan(numbers).argmax()), "expected a time, got NaN; remove the row")
    return numbers + 0.0  # -0.0 and 0.0 are one time


def _parse_times(column: pa.Array, name: str) -> pa.Array:
    unfit = {}
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        row = _first_unfit(column, kind)
        if row is None:
            return column.cast(kind)
        unfit[kind] = row
    row = max(unfit.values())
    raise BadCell(name, row, f"expected a time (a number, or like 2024-05-31 23:59:59), got '{column[row]}'")


def _first_unfit(column: pa.Array, kind: pa.DataType) -> int | None:
    """Return the first row that cannot be cast, by halving; None if all can."""

    def fits(start: int, stop: int) -> bool:
        try:
            column.slice(start, stop - start).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return False
        return True

    start, stop = 0, len(column)
    if fits(start, stop):
        return None
    while stop - start > 1:
        middle = (start + stop) // 2
        start, stop = (middle, stop) if fits(start, middle) else (start, middle)
    return start


def to_numbers(column: pa.Array, name: str) -> Array:
    """Return numbers as float64, NaN where they are absent.

    Raises:
        BadCell: a cell is no number, or infinite.
    """
    if _is_text(column.type):
        trimmed = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    elif not _is_number(column.type):
        raise BadCell(name, 0, f"expected numbers, got {column.type}; list it under categorical, or remove it")
    row = _first_unfit(column, pa.float64()) if _is_text(column.type) else None
    if row is not None:
        raise BadCell(name, row, f"expected a number, got '{column[row]}'; list it under categorical, or correct it")
    numbers = column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    infinite = np.isinf(numbers)
    if infinite.any():
        row = int(infinite.argmax())
        raise BadCell(name, row, f"expected a finite number, got {column[row]}; correct it, or leave the cell empty")
    return np.asarray(numbers)


def to_ids(column: pa.Array, config: CategoricalColumn) -> Ids:
    """Return a categorical column's ids; of lists, absent ones (not empty ones) hold the one code of absence.

    Raises:
        BadCell: the column holds lists and the schema does not say so, or the other way round.
    """
    listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if listed != config.is_list and not (config.is_list and config.separator is not None):
        wanted = "lists" if config.is_list else "one id per row"
        cure = (
            "set separator, or remove is_list" if config.is_list else "unnest it, or set is_list = true for a feature"
        )
        raise BadCell(config.name, 0, f"expected {wanted}, got {column.type}; {cure}")
    if not config.is_list:
        return encode_values(_as_texts(column))
    if not listed:
        column = pc.if_else(pc.equal(column, ""), None, column)
        column = pc.split_pattern(_as_texts(column), config.separator)
    return _encode_lists(column)


def _encode_lists(column: pa.Array) -> Ids:
    flat = column.flatten()  # skips the values under absent lists, which offsets may still span
    flat = encode_values(_as_texts(flat))
    counts = pc.list_value_length(column)
    absent = counts.is_null().to_numpy(zero_copy_only=False)
    counts = counts.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    codes = flat.codes
    assert not isinstance(codes, Bags)
    bag = np.repeat(np.arange(len(counts)), counts)[codes >= 0]
    kept = np.bincount(bag, minlength=len(counts))
    offsets = np.concatenate([[0], np.cumsum(kept + absent)])
    values = np.full(offsets[-1], -1, dtype=codes.dtype)
    within = np.arange(len(bag)) - (np.cumsum(kept) - kept)[bag]
    values[offsets[bag] + within] = codes[codes >= 0]
    return Ids(codes=Bags(offsets=offsets, values=values), keys=flat.keys, values=flat.values)


def _as_texts(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(pa.string()))
    if pa.types.is_null(column.type):
        return column.cast(pa.string())
    if _is_text(column.type):
        return column
    encoded = column.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.string()))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    exact = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    return bool(exact or pa.types.is_floating(kind) or pa.types.is_null(kind))
