"""Proves that a prepared dataset is what plain Python makes of the same rows, whatever the format and the processes."""

from __future__ import annotations

import csv
import gzip
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import xxhash

from dlrm.data.dataset import Bags, Dataset
from dlrm.data.known import criteo_schema
from dlrm.data.prepare import WORK, prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig

SCHEMA = DataSchema(
    format="csv",
    label="click",
    time="when",
    numeric=(
        NumericColumn(name="plain", transform="none"),
        NumericColumn(name="logarithm", transform="log1p"),
        NumericColumn(name="scaled", transform="standardise", missing_indicator=True),
        NumericColumn(name="both", transform="log1p_standardise"),
        NumericColumn(name="rank", transform="quantile"),
    ),
    categorical=(
        CategoricalColumn(name="user", min_count=1),
        CategoricalColumn(name="item", min_count=3),
        CategoricalColumn(name="capped", min_count=1, num_rows=5),
        CategoricalColumn(name="hashed", ids="hash", num_rows=50),
        CategoricalColumn(name="tags", min_count=2, is_list=True, separator="|"),
        CategoricalColumn(name="hashed_tags", ids="hash", num_rows=20, is_list=True, separator="|"),
    ),
    split=SplitConfig(by="order", valid=0.15, test=0.25),
)
COLUMNS = ["click", "when", *(c.name for c in SCHEMA.numeric), *(c.name for c in SCHEMA.categorical)]


def draw_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows as texts; about every tenth cell is empty."""
    draw = random.Random(seed)

    def cell(text: object) -> str:
        return "" if draw.random() < 0.1 else str(text)

    return [
        {
            "click": str(draw.randint(0, 1)),
            "when": str(1_700_000_000 + 10 * number),
            "plain": cell(draw.gauss(0, 1)),
            "logarithm": cell(draw.randint(-20, 1000)),
            "scaled": cell(1_700_000_000 + draw.randint(-99, 99)),  # more digits than a float32 has
            "both": cell(draw.randint(0, 5000)),
            "rank": cell(draw.randint(0, 30)),
            "user": cell(f"u{draw.randint(0, 40)}"),
            "item": cell(int(draw.paretovariate(0.7)) % 1000),
            "capped": cell(draw.choice("abcdefgh")),
            "hashed": cell(draw.randint(0, 500)),
            "tags": cell("|".join(draw.choices("αβγδεζ", k=draw.randint(1, 4)))),
            "hashed_tags": cell("|".join(draw.choices(["x", "y", "", "z"], k=draw.randint(1, 5)))),
        }
        for number in range(count)
    ]


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def contents(dataset: Dataset, split: str) -> dict[str, list]:
    """All columns of a split as plain lists."""
    found: dict[str, list] = {"label": [], "numeric": [], "time": []}
    for index in range(len(dataset.info.splits.get(split, ()))):
        part = dataset.part(split, index)
        found["label"] += part.label.tolist()
        found["numeric"] += part.numeric.tolist()
        found["time"] += part.extra["time"].tolist() if "time" in part.extra else []
        for name, ids in part.features.items():
            if isinstance(ids, Bags):
                bags = [ids.values[a:b].tolist() for a, b in zip(ids.offsets[:-1], ids.offsets[1:], strict=True)]
            else:
                bags = ids.tolist()
            found.setdefault(name, []).extend(bags)
    return found


class Reference:
    """The same encoding, row by row in plain Python."""

    def __init__(self, schema: DataSchema, train: list[dict[str, str]]) -> None:
        self.numbers = {c.name: [float(r[c.name]) for r in train if r[c.name]] for c in schema.numeric}
        self.rows: dict[str, dict[str, int]] = {}
        for column in schema.categorical:
            counts = Counter(text for row in train for text in self.texts(column, row[column.name]))
            kept = [text for text in counts if counts[text] >= column.min_count]
            kept.sort(key=lambda text: (-counts[text], text))
            kept = kept[: column.num_rows - 2] if column.num_rows else kept
            self.rows[column.name] = {text: row + 2 for row, text in enumerate(kept)}

    @staticmethod
    def texts(column: CategoricalColumn, cell: str) -> list[str]:
        return [text for text in (cell.split(column.separator) if column.is_list else [cell]) if text]

    def ids(self, column: CategoricalColumn, cell: str) -> int | list[int]:
        if not cell:
            return [1] if column.is_list else 1
        found = [
            2 + xxhash.xxh64_intdigest(text.encode()) % (column.num_rows - 2)
            if column.ids == "hash"
            else self.rows[column.name].get(text, 0)
            for text in self.texts(column, cell)
        ]
        return found if column.is_list else found[0]

    def number(self, column: NumericColumn, cell: str) -> list[float]:
        known = self.numbers[column.name]
        x = float(cell) if cell else None
        if column.transform.startswith("log1p"):
            known = [math.copysign(math.log1p(abs(v)), v) for v in known]
            x = None if x is None else math.copysign(math.log1p(abs(x)), x)
        if x is not None and column.transform.endswith("standardise"):
            mean = math.fsum(known) / len(known)
            x = (x - mean) / math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
        if x is not None and column.transform == "quantile":
            below, upto = sum(v < x for v in known), sum(v <= x for v in known)
            if upto > below:
                x = (below + upto - 1) / 2 / (len(known) - 1)
            else:
                x = math.nan  # between two values; the caller draws none of these
        return [0.0 if x is None else x] + ([float(x is None)] if column.missing_indicator else [])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return draw_rows(1000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepare")


@pytest.fixture(scope="module")
def dataset(folder: Path, rows: list[dict[str, str]]) -> Dataset:
    """Prepared from CSV in many blocks."""
    return prepare(SCHEMA, [write_csv(folder / "rows.csv", rows)], folder / "csv", processes=1, block_bytes=8000)


def test_dataset_equals_plain_python(dataset: Dataset, rows: list[dict[str, str]]) -> None:
    assert len(dataset.info.splits["train"]) > 5
    reference = Reference(SCHEMA, rows[:600])
    for split, expected in {"train": rows[:600], "valid": rows[600:750], "test": rows[750:]}.items():
        found = contents(dataset, split)
        assert found["label"] == [int(row["click"]) for row in expected]
        assert found["time"] == [int(row["when"]) for row in expected]
        for column in SCHEMA.categorical:
            assert found[column.name] == [reference.ids(column, row[column.name]) for row in expected], column.name
        numbers = [[x for c in SCHEMA.numeric for x in reference.number(c, row[c.name])] for row in expected]
        np.testing.assert_allclose(np.array(found["numeric"]), np.array(numbers), rtol=2e-6, atol=2e-6)


def test_description_says_what_the_columns_are(dataset: Dataset) -> None:
    info = Dataset(dataset.folder).info
    assert info.numeric == ("plain", "logarithm", "scaled", "scaled:missing", "both", "rank")
    assert [feature.name for feature in info.features] == [column.name for column in SCHEMA.categorical]
    assert {f.name: f.num_rows for f in info.features} | {"user": 43, "capped": 5, "hashed": 50} == {
        f.name: f.num_rows for f in info.features
    }
    assert [f.is_list for f in info.features] == [False, False, False, False, True, True]
    for feature in info.features:
        highest = max(np.max(flat) for split in info.splits for flat in flat_ids(dataset, split, feature.name))
        assert highest < feature.num_rows
    assert info.extra == ("time",)
    assert not (dataset.folder / WORK).exists()
    dataset.verify()


def flat_ids(dataset: Dataset, split: str, name: str) -> list[np.ndarray]:
    found = [dataset.part(split, index).features[name] for index in range(len(dataset.info.splits[split]))]
    return [ids.values if isinstance(ids, Bags) else ids for ids in found]


def test_dictionary_file_lists_values_by_row(dataset: Dataset, rows: list[dict[str, str]]) -> None:
    with pa.memory_map(str(dataset.folder / "vocabulary" / "item.arrow")) as file:
        table = pa.ipc.open_file(file).read_all().to_pydict()
    reference = Reference(SCHEMA, rows[:600]).rows["item"]
    assert {value: row + 2 for row, value in enumerate(table["value"])} == reference
    counts = Counter(row["item"] for row in rows[:600])
    assert table["count"] == [counts[value] for value in table["value"]]


def checksums(dataset: Dataset) -> list[str]:
    return [part.xxh3 for parts in dataset.info.splits.values() for part in parts]


def test_processes_do_not_change_a_byte(dataset: Dataset, folder: Path) -> None:
    for processes in (2, 3):
        again = prepare(
            SCHEMA, [folder / "rows.csv"], folder / f"by {processes}", processes=processes, block_bytes=8000
        )
        assert (again.folder / "dataset.json").read_bytes() == (dataset.folder / "dataset.json").read_bytes()
        again.verify()
        for file in (dataset.folder / "vocabulary").iterdir():
            assert (again.folder / "vocabulary" / file.name).read_bytes() == file.read_bytes()


def test_compression_and_several_files_do_not_change_the_rows(
    dataset: Dataset, folder: Path, rows: list[dict[str, str]]
) -> None:
    text = (folder / "rows.csv").read_bytes()
    (folder / "rows.csv.gz").write_bytes(gzip.compress(text))
    (folder / "rows.csv.zst").write_bytes(pa.compress(text, codec="zstd", asbytes=True))
    (folder / "days").mkdir()
    for day in range(12):  # day_10 comes after day_9
        write_csv(folder / "days" / f"day_{day}.csv", rows[day * 90 : (day + 1) * 90 if day < 11 else None])
    expected = [contents(dataset, split) for split in dataset.info.splits]
    for source, out in (("rows.csv.gz", "gz"), ("rows.csv.zst", "zst"), ("days", "many"), ("days/day_*.csv", "glob")):
        found = prepare(SCHEMA, [folder / source], folder / out, processes=1, block_bytes=8000)
        assert [contents(found, split) for split in found.info.splits] == expected, source
        if source.startswith("rows"):
            assert checksums(found) == checksums(dataset)


@pytest.mark.parametrize("kind", ["tsv", "semicolons", "parquet", "typed parquet", "lists in parquet"])
def test_formats_agree(kind: str, dataset: Dataset, folder: Path, rows: list[dict[str, str]]) -> None:
    schema, out = SCHEMA, folder / kind
    if kind in ("tsv", "semicolons"):
        source = write_csv(folder / f"{kind}.{'tsv' if kind == 'tsv' else 'csv'}", rows, "\t" if kind == "tsv" else ";")
        schema = change(schema, format="tsv" if kind == "tsv" else "csv")
    else:
        source = folder / f"{kind}.parquet"
        schema = change(schema, format="parquet")
        table = pa.table({name: [row[name] or None for row in rows] for name in COLUMNS})
        if kind != "parquet":
            table = pyarrow.csv.read_csv(folder / "rows.csv")
            table = table.set_column(
                table.column_names.index("when"), "when", table["when"].cast(pa.timestamp("s")).cast(pa.timestamp("ns"))
            )
        if kind == "lists in parquet":
            for name in ("tags", "hashed_tags"):
                lists = [row[name].split("|") if row[name] else None for row in rows]
                table = table.set_column(table.column_names.index(name), name, pa.array(lists))
            split = {"is_list": True, "separator": None}
            schema = change(
                schema, categorical=(*schema.categorical[:4], *(change(c, **split) for c in schema.categorical[4:]))
            )
        pq.write_table(table, source, row_group_size=170)
    found = prepare(schema, [source], out, processes=1, block_bytes=8000)
    for name in dataset.info.splits:
        assert contents(found, name) == contents(dataset, name)


def change(config: object, **values: object) -> object:
    return type(config)(**{**config.__dict__, **values})


def test_hash_is_the_same_everywhere(tmp_path: Path) -> None:
    """Rows of a table must not move between machines and versions: these come from XXH64's specification."""
    source = tmp_path / "a.csv"
    source.write_text("click,id\n0,\n1,a\n0,abc\n1,München\n")
    schema = DataSchema(
        format="csv",
        label="click",
        categorical=(CategoricalColumn(name="id", ids="hash", num_rows=1_000_002),),
        split=SplitConfig(valid=0, test=0),
    )
    known = {"a": 0xD24EC4F1A98C6E5B, "abc": 0x44BC2CF5AD770999}
    found = contents(prepare(schema, [source], tmp_path / "out"), "train")["id"]
    assert found[:3] == [1, 2 + known["a"] % 1_000_000, 2 + known["abc"] % 1_000_000]


def test_finished_dataset_is_opened_not_made_again(dataset: Dataset, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}
    again = prepare(SCHEMA, [folder / "rows.csv"], dataset.folder, block_bytes=8000)
    assert again.fingerprint == dataset.fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in dataset.folder.rglob("*")}


def test_other_input_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", draw_rows(50))
    prepare(SCHEMA, [source], tmp_path / "out")
    with pytest.raises(ValueError, match=r"other input.*schema"):
        prepare(change(SCHEMA, time=None), [source], tmp_path / "out")
    write_csv(source, draw_rows(50, seed=1))
    with pytest.raises(ValueError, match=r"other input.*files"):
        prepare(SCHEMA, [source], tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        prepare(SCHEMA, [source], tmp_path / "mine")


def test_real_criteo_rows(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "criteo_kaggle" / "train_head_10000.tsv"
    dataset = prepare(criteo_schema(), [path], tmp_path / "out")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    names = ("label", *dataset.info.numeric, *(feature.name for feature in dataset.info.features))
    rows = [dict(zip(names, line, strict=True)) for line in lines]
    assert (dataset.rows("train"), dataset.rows("test")) == (8000, 2000)
    schema = criteo_schema()
    reference = Reference(schema, rows[:8000])
    for split, expected in (("train", rows[:8000]), ("test", rows[8000:])):
        found = contents(dataset, split)
        assert found["label"] == [int(row["label"]) for row in expected]
        for column in schema.categorical:
            assert found[column.name] == [reference.ids(column, row[column.name]) for row in expected]
