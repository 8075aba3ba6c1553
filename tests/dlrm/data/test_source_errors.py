"""Every fault of a source ends in one line that names file, line, column and what to do, and keeps the work done."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm.data import work
from dlrm.data.known import criteo_schema
from dlrm.data.prepare import WORK, prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig

ROWS = "".join(f"{i % 2},{i},{i * 0.5},u{i % 5},a|b,{1_700_000_000 + i}\n" for i in range(100))
HEADER = "click,n,x,user,tags,when\n"


def schema(**settings: object) -> DataSchema:
    defaults: dict = {
        "format": "csv",
        "label": "click",
        "time": "when",
        "numeric": (NumericColumn(name="n"), NumericColumn(name="x")),
        "categorical": (
            CategoricalColumn(name="user"),
            CategoricalColumn(name="tags", min_count=1, is_list=True, separator="|"),
        ),
        "split": SplitConfig(by="order", valid=0.0, test=0.2),
    }
    return DataSchema(**(defaults | settings))


def expect_error(
    folder: Path, text: str | bytes, message: str, name: str = "rows.csv", processes: int = 1, **settings: object
) -> None:
    source = folder / name
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(schema(**settings), [source], folder / "out", processes=processes, block_bytes=500)
    assert "\n" not in str(caught.value)
    assert not (folder / "out" / "dataset.json").exists()


def test_after_a_fault_the_corrected_source_is_prepared(tmp_path: Path) -> None:
    expect_error(tmp_path, replace_line(77, "1,abc,1,u,a,9"), "line 77")
    (tmp_path / "rows.csv").write_text(HEADER + ROWS)
    dataset = prepare(schema(), [tmp_path / "rows.csv"], tmp_path / "out", processes=1, block_bytes=500)
    whole = prepare(schema(), [tmp_path / "rows.csv"], tmp_path / "whole", processes=1, block_bytes=500)
    assert dataset.fingerprint == whole.fingerprint
    dataset.verify()


def replace_line(number: int, line: str) -> str:
    """The file with line `number` (from 1, the header is 1) replaced."""
    lines = (HEADER + ROWS).split("\n")
    lines[number - 1] = line
    return "\n".join(lines)


CELLS = {
    "label 2": ("2,1,1,u,a,9", r"rows\.csv, line 77: column 'click': expected the label to be 0 or 1, got 2"),
    "label text": ("yes,1,1,u,a,9", r"line 77: column 'click': expected a number, got 'yes'"),
    "no label": (",1,1,u,a,9", r"line 77: column 'click': expected the label to be 0 or 1, got nothing"),
    "text": ("1,abc,1,u,a,9", r"line 77: column 'n': expected a number, got 'abc'; list it under categorical"),
    "infinite": ("1,1,inf,u,a,9", r"line 77: column 'x': expected a finite number, got inf"),
    "too large": ("1,1,1e999,u,a,9", r"line 77: column 'x': expected a finite number, got inf"),
    "no time": ("1,1,1,u,a,", r"line 77: column 'when': expected a time, got nothing"),
    "bad time": ("1,1,1,u,a,soon", r"line 77: column 'when': expected a time \(a number, or like .*\), got 'soon'"),
    "few cells": ("1,1,1,u", r"line 77: column 'user': expected 6 cells in the row, got 4"),
    "many cells": ("1,1,1,u,a,9,9,9", r"line 77: column 'when': expected 6 cells in the row, got 8"),
}


@pytest.mark.parametrize(("line", "message"), CELLS.values(), ids=CELLS.keys())
def test_bad_cell_is_named(line: str, message: str, tmp_path: Path) -> None:
    expect_error(tmp_path, replace_line(77, line), message)


def test_bad_cell_is_named_from_another_process(tmp_path: Path) -> None:
    expect_error(tmp_path, replace_line(77, CELLS["text"][0]), CELLS["text"][1], processes=2)


def test_lines_are_counted_through_quotes_blank_lines_and_compression(tmp_path: Path) -> None:
    lines = (HEADER + ROWS).replace("u3", '"u\n3"').split("\n")
    lines[40] = lines[40] + "\n\n"
    text = "\n".join(lines).replace(",88,", ",eighty-eight,")
    line = text[: text.index("eighty-eight")].count("\n") + 1
    expect_error(tmp_path, text, f"rows.csv, line {line}: column 'n'")
    expect_error(tmp_path, gzip.compress(text.encode()), f"rows.csv.gz, line {line}: column 'n'", name="rows.csv.gz")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    text = replace_line(50, "1,1,1,M\xfcnchen,a,9").encode("latin-1")
    expect_error(tmp_path, text, r"line 50: column 'user': expected UTF-8 text, got b'M\\xfcnchen'; convert the file")


def test_unbalanced_quotes(tmp_path: Path) -> None:
    expect_error(tmp_path, replace_line(30, '1,1,1,"u,a,9'), r"rows\.csv, line \d+: expected")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header and rows, found an empty file"),
        (HEADER, r"expected rows in .*rows\.csv, found none"),
        (HEADER + "\n\n\n", r"expected rows in .*rows\.csv, found none"),
        (HEADER + "1,1,1,u,a,9\n", r"split: expected rows in every part, got train 1, valid 0, test 0 of 1 rows"),
    ],
)
def test_empty_sources(text: str, message: str, tmp_path: Path) -> None:
    expect_error(tmp_path, text, message)


@pytest.mark.parametrize("role", ["label", "time", "numeric", "categorical"])
def test_absent_column(role: str, tmp_path: Path) -> None:
    column = {
        "label": "nope",
        "time": "nope",
        "numeric": (NumericColumn(name="nope"),),
        "categorical": (CategoricalColumn(name="nope"),),
    }
    found = "click, n, x, user, tags, when"
    expect_error(
        tmp_path, HEADER + ROWS, rf"rows\.csv: expected a column 'nope', found {found}", **{role: column[role]}
    )


def test_absent_column_in_the_second_file(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text(HEADER + ROWS)
    (tmp_path / "2.csv").write_text(HEADER.replace("user", "visitor") + ROWS)
    with pytest.raises(ValueError, match=r"2\.csv: expected a column 'user', found click, n, x, visitor"):
        prepare(schema(), [tmp_path / "*.csv"], tmp_path / "out")


def test_column_that_is_there_twice(tmp_path: Path) -> None:
    text = HEADER.replace("x,user", "user,user") + ROWS
    expect_error(tmp_path, text, "expected one column 'user', found 2; rename one", numeric=(NumericColumn(name="n"),))


def test_columns_may_stand_in_another_order_in_each_file(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("click,user,other\n" + "1,a,x\n0,b,y\n" * 10)
    (tmp_path / "2.csv").write_text("user,click\n" + "a,1\nb,0\n" * 10)
    plain = schema(numeric=(), categorical=(CategoricalColumn(name="user"),), time=None)
    dataset = prepare(plain, [tmp_path / "1.csv", tmp_path / "2.csv"], tmp_path / "out")
    for split in ("train", "test"):
        for index in range(len(dataset.info.splits[split])):
            part = dataset.part(split, index)
            assert (part.features["user"] == 3 - part.label).all()


def test_column_that_is_always_missing(tmp_path: Path) -> None:
    """A value in a test row does not help: there is nothing to learn from."""
    lines = [f"{i % 2},,{i},{'u' if i >= 90 else ''},a,{i}" for i in range(100)]
    message = "expected values in every column, got none in any training row of user, n; remove it from the schema"
    expect_error(tmp_path, HEADER + "\n".join(lines), message)


def test_label_threshold(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("stars,user\n" + "".join(f"{stars},u\n" for stars in (1, 3.5, 4, 5, 4.5)))
    ratings = schema(
        label="stars",
        label_threshold=4.0,
        numeric=(),
        time=None,
        categorical=(CategoricalColumn(name="user"),),
        split=SplitConfig(valid=0, test=0),
    )
    assert prepare(ratings, [source], tmp_path / "out").part("train", 0).label.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("truth", [("true", "false"), ("True", "False"), ("1.0", "0"), ("1", "0")])
def test_label_spellings(truth: tuple[str, str], tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text("click,user\n" + "".join(f"{truth[i % 2]},u\n" for i in range(4)))
    plain = schema(
        numeric=(), time=None, categorical=(CategoricalColumn(name="user"),), split=SplitConfig(valid=0, test=0)
    )
    assert prepare(plain, [source], tmp_path / "out").part("train", 0).label.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("kind", ["cut short", "corrupt", "zip", "zst cut short"])
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    packed = gzip.compress((HEADER + ROWS).encode() * 30)
    text = {
        "cut short": packed[:-20],
        "corrupt": packed[:200] + b"\x00\xff" * 20 + packed[240:],
        "zip": b"PK\x03\x04rest",
        "zst cut short": pa.compress((HEADER + ROWS).encode(), codec="zstd", asbytes=True)[:-9],
    }[kind]
    message = "got zip; unpack it first" if kind == "zip" else r"rows\.csv\.gz is damaged or cut short \(.*\); fetch"
    expect_error(tmp_path, text, message, name="rows.csv.gz")


def test_damaged_parquet(tmp_path: Path) -> None:
    table = pa.table({"click": [0, 1] * 500, "n": range(1000), "x": [1.0] * 1000, "user": ["u"] * 1000})
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=100)
    whole = (tmp_path / "whole.parquet").read_bytes()
    settings = {"format": "parquet", "time": None, "categorical": (CategoricalColumn(name="user"),)}
    expect_error(tmp_path, whole[:-50], "cannot be read as parquet", name="a.parquet", **settings)
    corrupt = whole[:1000] + bytes(3000) + whole[4000:]
    expect_error(tmp_path, corrupt, r"a\.parquet is damaged or cut short", name="a.parquet", **settings)


def test_bad_cell_in_parquet_names_the_row(tmp_path: Path) -> None:
    table = pa.table({"click": [0, 1] * 500, "user": ["u"] * 1000}).set_column(
        0, "click", pa.array([0, 1] * 300 + [7] + [1] * 399)
    )
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=250)
    plain = schema(format="parquet", time=None, numeric=(), categorical=(CategoricalColumn(name="user"),))
    with pytest.raises(
        ValueError, match=r"rows\.parquet, row 601: column 'click': expected the label to be 0 or 1, got 7"
    ):
        prepare(plain, [tmp_path / "rows.parquet"], tmp_path / "out", processes=1, block_bytes=500)


@pytest.mark.parametrize(
    ("column", "config", "message"),
    [
        ("lists", CategoricalColumn(name="lists"), r"column 'lists': expected one id per row, got list<.*set is_list"),
        ("user", CategoricalColumn(name="user", is_list=True), "column 'user': expected lists, got string; set separ"),
        ("when", NumericColumn(name="when"), r"column 'when': expected numbers, got timestamp\[us\]; list it under"),
        ("lists", NumericColumn(name="lists"), "column 'lists': expected numbers, got list<"),
    ],
)
def test_types_of_parquet_columns(column: str, config: object, message: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "click": [0, 1] * 5,
            "user": ["a", "b"] * 5,
            "other": ["a"] * 10,
            "lists": [["a"], []] * 5,
            "when": pa.array(range(10), pa.timestamp("us")),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    numeric = isinstance(config, NumericColumn)
    made = schema(
        format="parquet",
        time=None,
        numeric=(config,) if numeric else (),
        categorical=(CategoricalColumn(name="other"),) if numeric else (config,),
    )
    with pytest.raises(ValueError, match=message):
        prepare(made, [tmp_path / "rows.parquet"], tmp_path / "out")


def test_criteo_test_file(tmp_path: Path) -> None:
    line = "\t".join(["1"] * 13 + ["abcdef01"] * 26)
    (tmp_path / "test.txt").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"test\.txt: expected 40 columns.*got 39.*test file, which has no labels"):
        prepare(criteo_schema(), [tmp_path / "test.txt"], tmp_path / "out")
    (tmp_path / "other.txt").write_text("a,b,c\n")
    with pytest.raises(ValueError, match=r"expected 40 tab-separated columns.*got 1; set the schema's format"):
        prepare(criteo_schema(), [tmp_path / "other.txt"], tmp_path / "out")


def test_absent_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no files at .*nowhere\.csv"):
        prepare(schema(), [tmp_path / "nowhere.csv"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found no files matching \*\.csv.* at .*empty"):
        prepare(schema(), [tmp_path / "empty"], tmp_path / "out")


def test_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text(HEADER + ROWS)
    whole_folder, left = work.whole_folder, 5

    def whole_folder_until_full(path: Path):  # type: ignore[no-untyped-def]
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_folder(path)

    for module in ("chunk", "vocabulary"):
        monkeypatch.setattr(f"dlrm.data.{module}.whole_folder", whole_folder_until_full)
    with pytest.raises(ValueError, match=r"the disk of .*out is full; what is done is kept: make room and run"):
        prepare(schema(), [tmp_path / "rows.csv"], tmp_path / "out", processes=1, block_bytes=500)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / WORK / "chunks").rglob("*.arrow")}
    assert len(kept) == 10
    seen = []
    left = 1000

    def look(stage: str, share: float, rows: int) -> None:
        seen.append({path: path.stat().st_mtime_ns for path in kept if path.exists()})

    prepare(schema(), [tmp_path / "rows.csv"], tmp_path / "out", processes=1, block_bytes=500, progress=look)
    assert seen[0] == seen[-1] == kept


@pytest.mark.parametrize(("wrong", "threshold"), [("0", None), ("1", None), ("3", 4.0)])
def test_training_rows_of_one_class(wrong: str, threshold: float | None, tmp_path: Path) -> None:
    """Both classes in the test part do not help: there is nothing to learn."""
    lines = [f"{i % 2 * 5 if i >= 80 else wrong},{i},1,u,a,{i}\n" for i in range(100)]
    text = HEADER + "".join(lines).replace("5,", "1,") if threshold is None else HEADER + "".join(lines)
    message = rf"column 'click': expected labels 0 and 1 among the training rows, got {int(wrong == '1')} in all 80; "
    expect_error(tmp_path, text, message + ("check label and label_threshold = 4" if threshold else "check label"),
         label_threshold=threshold)  # fmt: skip


def test_a_test_part_of_one_class_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(HEADER + "".join(f"{i % 2 if i < 80 else 1},{i},{i},u,a,{i}\n" for i in range(100)))
    settings = schema(split=SplitConfig(by="order", valid=0.2, test=0.2))
    dataset = prepare(settings, [source], tmp_path / "out", processes=1, block_bytes=500)
    (warning,) = dataset.info.origin["warnings"]
    assert "test: column 'click' is 1 in all 20 rows, so AUC is not defined there" in warning
    assert capsys.readouterr().err == f"recforge: warning: {warning}\n"
    assert dataset.info.origin["clicks"] == {"train": 30, "valid": 10, "test": 20}


@pytest.mark.parametrize("folder", ["/proc/no/such", "rows.csv/out"])
def test_a_folder_that_cannot_be_made(folder: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(HEADER + ROWS)
    with pytest.raises(ValueError, match=rf"expected a folder that can be written for the dataset, .*{folder} cannot"):
        prepare(schema(), [tmp_path / "rows.csv"], tmp_path / folder, processes=1)


def test_a_dictionary_that_keeps_nothing_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(HEADER + "".join(f"{i % 2},1,{i},u{i},a,{i}\n" for i in range(100)))
    dataset = prepare(schema(), [source], tmp_path / "out", processes=1)
    (warning,) = dataset.info.origin["warnings"]
    assert warning.startswith("column 'user': none of its 80 values is there 2 times in the training part")
    assert warning in capsys.readouterr().err
