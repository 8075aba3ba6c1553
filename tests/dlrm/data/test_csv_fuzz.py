"""Feeds CSV files of every shape through `prepare`, in tiny blocks, and reads each cell back through the dictionary."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlrm.data.dataset import Dataset
from dlrm.data.prepare import prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig
from dlrm.data.tabular import MISSING_TEXTS

EXAMPLES = int(os.environ.get("RECFORGE_EXAMPLES", "60"))

cells = st.one_of(
    st.sampled_from(
        ["", "a", "b", "7", " 7", "NULL", "nan", '"', '""', ",", "\n", "\r\n", "x,y", 'say "x"', "İ", "日本", "😀"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12),
)
numbers = st.one_of(st.just(""), st.floats(-1e6, 1e6).map(repr), st.integers(-(10**6), 10**6).map(str))
tables = st.lists(st.tuples(st.sampled_from("01"), cells, numbers, cells), min_size=1, max_size=40)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=tables,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from(",;"),
    bom=st.booleans(),
    last_end=st.booleans(),
    block_bytes=st.sampled_from([700, 1 << 20]),
)
def test_every_cell_survives(
    rows: list[tuple[str, ...]], quoting: int, end: str, delimiter: str, bom: bool, last_end: bool, block_bytes: int
) -> None:
    names = ["y", "first, column", "number", 'last "column"']
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=quoting, lineterminator=end, delimiter=delimiter)
    writer.writerows([names, *rows])
    raw = text.getvalue() if last_end else text.getvalue().removesuffix(end)
    expected = list(csv.reader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter))[1:]
    schema = DataSchema(
        format="csv",
        label="y",
        numeric=(NumericColumn(name="number", transform="none", missing_indicator=True),),
        categorical=tuple(CategoricalColumn(name=name, min_count=1) for name in (names[1], names[3])),
        split=SplitConfig(valid=0, test=0),
    )
    missing = [[row[place] in MISSING_TEXTS for row in expected] for place in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "rows.csv"
        source.write_bytes((b"\xef\xbb\xbf" if bom else b"") + raw.encode())
        if any(map(all, missing)):
            schema = DataSchema(**{**schema.__dict__, "numeric": ()})
        if all(missing[0]) or all(missing[2]) or len({row[0] for row in expected}) < 2:
            return
        dataset = prepare(schema, [source], Path(name) / "out", processes=1, block_bytes=block_bytes)
        parts = [dataset.part("train", index) for index in range(len(dataset.info.splits["train"]))]
        assert [int(label) for part in parts for label in part.label] == [int(row[0]) for row in expected]
        for place, column in ((1, names[1]), (3, names[3])):
            ids = [row for part in parts for row in part.features[column]]
            assert decode(dataset, column, ids) == [
                None if row[place] in MISSING_TEXTS else row[place] for row in expected
            ]
        if schema.numeric:
            found = [row for part in parts for row in part.numeric.tolist()]
            for (number, absent), row in zip(found, expected, strict=True):
                assert absent == (row[2] == "")
                assert number == np.float32(row[2] or 0)


def decode(dataset: Dataset, column: str, ids: list[int]) -> list[str | None]:
    from dlrm.data.vocabulary import vocabulary_file

    with pa.memory_map(str(vocabulary_file(dataset.folder, column))) as file:
        values = pa.ipc.open_file(file).read_all()["value"].to_pylist()
    return [None if row == 1 else values[row - 2] for row in ids]
