"""What is known of items besides what users did with them: columns of a file, as bags of table rows for each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from contrastive.data.action_files import each_table
from contrastive.data.sequence_schema import ItemColumns
from dlrm.data.cells import BadCell, to_ids
from dlrm.data.dataset import Array, Bags, IntArray
from dlrm.data.schema import FIRST_ID_ROW, MISSING_ROW, OUT_OF_VOCABULARY_ROW, CategoricalColumn
from dlrm.data.tabular import ID_TYPE


@dataclass(frozen=True, kw_only=True)
class ItemFeature:
    """A feature of items.

    Attributes:
        name: of the feature.
        num_rows: of its table.
        bags: rows of the table for each id of an item, 0 ... num_items; that of PAD is empty.
        values: texts of rows 2, 3, ...
    """

    name: str
    num_rows: int
    bags: Bags
    values: tuple[str, ...]


def read_item_features(columns: ItemColumns, items: pa.LargeStringArray) -> tuple[tuple[ItemFeature, ...], int]:
    """Read the features of the catalogue's items; also return how many of them the files do not have.

    Items of the files that nobody acted upon are passed over.

    Args:
        columns: the files, and what they hold.
        items: names of the catalogue, in the order of ids from 1.

    Raises:
        ValueError: a file is absent or damaged, a cell does not fit, or an item comes twice; file and line are named;
            or there is no item of the catalogue.
    """
    number = {name: id for id, name in enumerate(items.to_pylist(), start=1)}
    seen: set[str] = set()
    types = {columns.item: pa.string()} | {
        column.name: pa.string() if column.is_list else ID_TYPE for column in columns.features
    }

    def take(table: pa.Table) -> list[_Cells]:
        ids = np.array(
            [_place(name, row, columns.item, seen, number) for row, name in enumerate(_names(table, columns))]
        )
        here = table.filter(pa.array(ids > 0)).combine_chunks()
        return [_Cells.of(ids[ids > 0], here.column(column.name), column) for column in columns.features]

    assert columns.format is not None
    tables = list(each_table(columns.format, columns.files, types, take))
    if seen.isdisjoint(number):
        raise ValueError(
            f"{', '.join(columns.files)}: expected rows of items of the catalogue (like '{items[0]}') in the column "
            f"'{columns.item}', got none among {len(seen)}; name the right one by --schema.items.item"
        )
    features = tuple(
        _encode(column, [cells[index] for cells in tables], len(items)) for index, column in enumerate(columns.features)
    )
    return features, len(set(number) - seen)


def _names(table: pa.Table, columns: ItemColumns) -> list[str | None]:
    names: list[str | None] = table.column(columns.item).cast(pa.string()).to_pylist()
    return names


def _place(name: str | None, row: int, column: str, seen: set[str], number: dict[str, int]) -> int:
    if not name:
        raise BadCell(column, row, "expected the name of an item, got nothing; remove the row")
    if name in seen:
        raise BadCell(column, row, f"expected each item once, got '{name}' again; remove the row")
    seen.add(name)
    return number.get(name, 0)


class _Cells(NamedTuple):
    """Values of one column: item items[i] has the value of key keys[i], or none where absent[i]; `given` has a row."""

    items: IntArray
    keys: IntArray
    absent: Array
    given: IntArray
    texts: dict[int, str]

    @staticmethod
    def of(ids: IntArray, cells: pa.ChunkedArray, column: CategoricalColumn) -> _Cells:
        if not column.is_list and (pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)):
            raise BadCell(
                column.name, 0, f"expected one value per item, got {cells.type}; name it by --schema.items.lists"
            )
        part = to_ids(pa.concat_arrays(cells.chunks) if cells.num_chunks else pa.array([], cells.type), column)
        bags = part.codes if isinstance(part.codes, Bags) else Bags(offsets=np.arange(len(ids) + 1), values=part.codes)
        items = np.repeat(ids, np.diff(bags.offsets))
        keys = np.append(part.keys, np.uint64(0))[bags.values]  # the last one for code -1
        texts = dict(zip(part.keys.tolist(), part.values.to_pylist(), strict=True))
        return _Cells(items, keys, bags.values < 0, ids, texts)


def _encode(column: CategoricalColumn, parts: list[_Cells], num_items: int) -> ItemFeature:
    """Give values rows of a table, the most frequent first, and each item its bag; items without a row have row 1."""
    items, keys, absent, given = (np.concatenate([part[place] for part in parts]) for place in range(4))
    rows, values = _number(column, keys, absent, {key: text for part in parts for key, text in part.texts.items()})
    rows[absent] = MISSING_ROW
    others = np.setdiff1d(np.arange(1, num_items + 1), given)
    items, rows = np.concatenate([items, others]), np.concatenate([rows, np.full(len(others), MISSING_ROW)])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=num_items + 1))])
    bags = Bags(offsets=offsets, values=rows[np.argsort(items, kind="stable")])
    return ItemFeature(name=column.name, num_rows=FIRST_ID_ROW + len(values), bags=bags, values=values)


def _number(
    column: CategoricalColumn, keys: IntArray, absent: Array, texts: dict[int, str]
) -> tuple[IntArray, tuple[str, ...]]:
    """Return the row of each key, and the values of rows 2, 3, ...: the most frequent first, then by their text."""
    known, counts = np.unique(keys[~absent], return_counts=True)
    named = [(-int(count), texts[int(key)], key) for key, count in zip(known, counts, strict=True)]
    kept = sorted(value for value in named if -value[0] >= column.min_count)
    row_of = {int(key): row for row, (_, _, key) in enumerate(kept, start=FIRST_ID_ROW)}
    rows = np.array([row_of.get(int(key), OUT_OF_VOCABULARY_ROW) for key in keys], dtype=np.int64)
    return rows, tuple(text for _, text, _ in kept)
