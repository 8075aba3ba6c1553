"""Prepared sequences are what the files say, are made once, and say so when they are damaged or of other input."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from contrastive.data.prepare_sequences import prepare_sequences, sequences_identity
from contrastive.data.sequence_dataset import SEQUENCES, SequenceDataset, SequenceInfo
from contrastive.data.sequence_schema import ItemColumns, SequenceSchema, SequenceSplit

SEQUENCE = [[4, 2, 5, 1, 3], [1, 2, 3], [5, 5], [2, 9, 2, 9, 7, 8]]


@pytest.mark.parametrize(
    ("name", "users", "items", "actions", "train", "batches"),
    [
        ("Amazon_Beauty", 22_363, 12_101, 198_502, 131_413, 514),
        ("Amazon_Toys_and_Games", 19_412, 11_924, 167_597, 109_361, 428),
        ("Taobao", 47_703, 53_326, 637_165, 494_056, 1930),
    ],
)
def test_real_sequences(
    shared_data: Path, tmp_path: Path, name: str, users: int, items: int, actions: int, train: int, batches: int
) -> None:
    file = shared_data / "sequences" / f"{name}.txt"
    dataset = prepare_sequences(SequenceSchema(), [file], tmp_path / "out")
    assert (dataset.info.num_users, dataset.num_items, dataset.info.num_actions) == (users, items, actions)
    assert (dataset.rows("train"), dataset.rows("valid"), dataset.rows("test")) == (train, users, users)
    assert -(-dataset.rows("train") // 256) == batches
    lines = [line.split() for line in file.read_text().splitlines()]
    chosen = np.random.default_rng(0).integers(0, users, 200)
    found = dataset.histories(chosen)
    assert found.items.tolist() == [int(item) for user in chosen for item in lines[user][1:]]
    held = dataset.samples("test", chosen)
    assert held.targets.tolist() == [int(lines[user][-1]) for user in chosen]
    assert held.histories.items.tolist() == [int(item) for user in chosen for item in lines[user][1:-1]]
    assert held.users.tolist() == chosen.tolist()
    counts = np.bincount([int(item) for line in lines for item in line[1:-2]], minlength=items + 1)
    assert np.array_equal(dataset.item_counts, counts)


def test_samples_are_all_prefixes(
    prepare_lines: Callable[..., SequenceDataset], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare_lines(SEQUENCE)

    def listed(split: str, max_length: int | None = None) -> list[tuple[list[int], int, int]]:
        histories, targets, users = dataset.samples(split, np.arange(dataset.rows(split)), max_length)
        parts = np.split(histories.items, np.cumsum(histories.lengths)[:-1])
        return list(zip([part.tolist() for part in parts], targets.tolist(), users.tolist(), strict=True))

    assert listed("train") == [
        ([4], 2, 0),
        ([4, 2], 5, 0),
        ([2], 9, 3),
        ([2, 9], 2, 3),
        ([2, 9, 2], 9, 3),
    ]
    assert listed("valid") == [([4, 2, 5], 1, 0), ([1], 2, 1), ([2, 9, 2, 9], 7, 3)]
    assert listed("test", 2) == [([5, 1], 3, 0), ([1, 2], 3, 1), ([9, 7], 8, 3)]
    assert dataset.histories(np.array([3, 2]), 5).items.tolist() == [9, 2, 9, 7, 8, 5, 5]
    assert dataset.item_counts.tolist() == [0, 1, 3, 0, 1, 1, 0, 0, 0, 2]
    assert dataset.info.unseen_targets == {"train": 0, "valid": 1, "test": 3}
    told = capsys.readouterr().err
    assert "1 of 4 users have fewer than 3 actions (the first is 'u2', with 2): they are neither learned nor" in told
    assert "3 of 3 targets of the test split are items that training never saw" in told


def test_names_of_users_and_items(prepare_lines: Callable[..., SequenceDataset]) -> None:
    dataset = prepare_lines(SEQUENCE)
    assert [dataset.find_user(f"u{user}") for user in range(4)] == [0, 1, 2, 3]
    assert dataset.user_name(3) == "u3"
    assert dataset.item_name(dataset.find_item("7")) == "7"
    with pytest.raises(ValueError, match=r"expected one of the 4 users \(like 'u0'\), got 'nobody'"):
        dataset.find_user("nobody")
    with pytest.raises(ValueError, match=r"expected one of the 9 items \(like '1'\), got '10'"):
        dataset.find_item("10")


def test_lists_where_one_value_is_expected_are_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a 1 2 3 4\nb 2 3 4 5\n")
    pq.write_table(pa.table({"item": ["1", "2"], "tags": [["x"], ["y", "z"]]}), tmp_path / "items.parquet")
    columns = ItemColumns(files=(str(tmp_path / "items.parquet"),), columns=("tags",))
    with pytest.raises(
        ValueError, match=r"'tags': expected one value per item, got .*list.*; name it by --schema.items.l"
    ):
        prepare_sequences(SequenceSchema(items=columns), [tmp_path / "log.txt"], tmp_path / "out")
    pq.write_table(pa.table({"user": ["a", "a"], "item": [["1"], ["2"]]}), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"'item': expected one id per row, got .*list.*; unnest it"):
        prepare_sequences(SequenceSchema(), [tmp_path / "log.parquet"], tmp_path / "out")


def test_prepared_once_and_never_over_something_else(tmp_path: Path) -> None:
    file, out = tmp_path / "log.txt", tmp_path / "out"
    file.write_text("a 1 2 3 4\nb 2 3 4 5\n")
    first = prepare_sequences(SequenceSchema(), [file], out)
    written = (out / "actions.arrow").stat().st_mtime_ns
    assert prepare_sequences(SequenceSchema(), [file], out).fingerprint == first.fingerprint
    assert (out / "actions.arrow").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"prepared from other input \(differs in schema\); delete it"):
        prepare_sequences(SequenceSchema(min_actions=4), [file], out)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "log.txt").write_text(file.read_text())
    os.utime(tmp_path / "copy" / "log.txt", ns=(5, 5))
    copied = prepare_sequences(SequenceSchema(), [tmp_path / "copy" / "log.txt"], tmp_path / "copied")
    assert copied.fingerprint == first.fingerprint
    before = sequences_identity(SequenceSchema(), [file])
    os.utime(file, ns=(1, 1))
    assert sequences_identity(SequenceSchema(), [file]) != before
    with pytest.raises(ValueError, match=r"prepared from other input \(differs in files\)"):
        prepare_sequences(SequenceSchema(), [file], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(ValueError, match="expected an empty or new folder for the sequences"):
        prepare_sequences(SequenceSchema(), [file], tmp_path / "mine")


def test_a_source_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    file, out = tmp_path / "log.txt", tmp_path / "out"
    file.write_text("a 1 2 3\nb 2 3\n")
    with pytest.raises(ValueError, match="expected samples in every part"):
        prepare_sequences(SequenceSchema(), [file], out)
    assert not out.exists()
    file.write_text("a 1 2 3\nb 2 3 4 x\n")
    with pytest.raises(ValueError, match=r"log\.txt, line 2"):
        prepare_sequences(SequenceSchema(), [file], out)
    assert not out.exists()


def test_a_damaged_folder_is_told(prepare_lines: Callable[..., SequenceDataset]) -> None:
    dataset = prepare_lines(SEQUENCE)
    dataset.verify()
    actions = dataset.folder / "actions.arrow"
    content = bytearray(actions.read_bytes())
    content[len(content) // 2] ^= 1
    actions.unlink()  # the open map keeps its own
    actions.write_bytes(content)
    with pytest.raises(ValueError, match=r"actions\.arrow is not what was written \(checksum\)"):
        dataset.verify()
    actions.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"actions\.arrow cannot be read .*; prepare the sequences again"):
        SequenceDataset(dataset.folder)
    description = dataset.folder / SEQUENCES
    text = description.read_text()
    description.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="expected format version 1, got 9"):
        SequenceDataset(dataset.folder)
    description.write_text(text[:50])
    with pytest.raises(ValueError, match=r"sequences\.json is damaged"):
        SequenceDataset(dataset.folder)
    description.unlink()
    with pytest.raises(ValueError, match=r"expected prepared sequences in .*, found no sequences\.json"):
        SequenceDataset(dataset.folder)


@pytest.mark.parametrize("kind", ["csv", "parquet", "folder"])
def test_rows_of_actions_with_features_of_items(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    actions = {
        "user": ["a", "b", "a", "b", "a", "b", "a", "b", "b"],
        "item": ["x", "y", "y", "z", "z", "x", "w", "w", "x"],
        "time": [1, 1, 2, 2, 3, 3, 4, 4, 5],
    }
    table = pa.table(actions)
    file = tmp_path / f"log.{'csv' if kind == 'csv' else 'parquet'}"
    if kind == "csv":
        pacsv.write_csv(table, file)
    else:
        pq.write_table(table, file)
    (tmp_path / "items.csv").write_text("item,brand,tags\ny,B,red|blue\nx,A,red\nother,B,green\nz,A,\n")
    items = tmp_path / "items.csv"
    if kind == "folder":
        items = items.rename(tmp_path.parent / f"{tmp_path.name}-items.csv")
    columns = ItemColumns(files=(str(items),), columns=("brand",), lists=("tags",))
    source = file.parent if kind == "folder" else file
    dataset = prepare_sequences(SequenceSchema(time="time", items=columns), [source], tmp_path / "out")
    assert [dataset.item_name(item) for item in range(1, 5)] == ["x", "y", "z", "w"]
    assert dataset.times is not None
    assert dataset.times.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert [(side.name, side.num_rows) for side in dataset.info.sides] == [("brand", 3), ("tags", 3)]
    assert [feature.num_rows for feature in dataset.info.features] == [5, 3, 3]

    def rows(name: str) -> list[list[int]]:
        bags = dataset.sides[name]
        return [part.tolist() for part in np.split(bags.values, bags.offsets[1:-1])]

    # of the catalogue, two items have brand A and tag 'red'; others are of one; w is not in the file
    assert rows("brand") == [[], [2], [0], [2], [1]]
    assert rows("tags") == [[], [2], [2, 0], [1], [1]]
    assert "1 of 4 items are not in the files of items; their features are absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,brand\nx,A\nx,B\n", r"items\.csv, line 3: column 'item': expected each item once, got 'x' again"),
        ("item,brand\nx,A\n,B\n", r"items\.csv, line 3: column 'item': expected the name of an item, got nothing"),
        ("item,colour\nx,A\n", r"items\.csv: expected a column 'brand', found item, colour"),
        ("item,brand\n1,A\n", r"items\.csv: expected rows of items of the catalogue \(like 'x'\) in the column 'item'"),
    ],
)
def test_what_is_wrong_with_items_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "log.csv").write_text("user,item\n" + "".join(f"a,{item}\n" for item in "xyzw"))
    (tmp_path / "items.csv").write_text(text)
    schema = SequenceSchema(items=ItemColumns(files=(str(tmp_path / "items.csv"),), columns=("brand",)))
    with pytest.raises(ValueError, match=message):
        prepare_sequences(schema, [tmp_path / "log.csv"], tmp_path / "out")


def test_rows_of_features_go_by_frequency(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("a 1 2 3 4 5 6\n")
    table = pa.table({"item": [1, 2, 3, 4, 6], "tags": [["b", "a"], ["c"], ["c", "b", "c"], [], None]})
    pq.write_table(table, tmp_path / "items.parquet")
    columns = ItemColumns(files=(str(tmp_path / "items.parquet"),), lists=("tags",), min_count=1)
    bags = prepare_sequences(SequenceSchema(items=columns), [tmp_path / "log.txt"], tmp_path / "out").sides["tags"]
    found = [part.tolist() for part in np.split(bags.values, bags.offsets[1:-1])]
    # PAD and item 4 have none; of items 5 and 6 none is known
    assert found == [[], [3, 4], [2], [2, 3, 2], [], [1], [1]]


def test_files_of_items_of_no_known_form(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\n" + "".join(f"a,{item}\n" for item in "xyzw"))
    (tmp_path / "items.txt").write_text("item brand\n")
    schema = SequenceSchema(items=ItemColumns(files=(str(tmp_path / "items.txt"),), columns=("brand",)))
    with pytest.raises(ValueError, match=r"expected \.csv, \.tsv or \.parquet files of items, got .*items\.txt"):
        prepare_sequences(schema, [tmp_path / "log.csv"], tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": ("a.csv",)}, r"--schema\.items: expected files, and columns or lists of them, got files alone"),
        ({"columns": ("b",)}, r"--schema\.items: expected files, and columns or lists of them, got b alone"),
        ({"files": ("a.csv",), "columns": ("b",), "lists": ("b",)}, r"--schema\.items\.columns: expected each once"),
        (
            {"files": ("a.csv",), "columns": ("item",)},
            r"none of 'item', 'train_count' and 'item', got item; rename one",
        ),
    ],
)
def test_columns_of_items_that_cannot_be(settings: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemColumns(**settings)


def test_cut_in_time_from_a_file(shared_data: Path, tmp_path: Path) -> None:
    schema = SequenceSchema(
        user="user_id", item="item_id", time="timestamp", split=SequenceSplit(by="time", held_out="all")
    )
    dataset = prepare_sequences(schema, [shared_data / "ml-100k" / "ml-100k.inter"], tmp_path / "out")
    assert dataset.times is not None
    ends = {}
    for split in ("train", "valid", "test"):
        times = dataset.times[dataset.positions(split, np.arange(dataset.rows(split)))[1]]
        ends[split] = (times.min(), times.max())
    assert ends["train"][1] < ends["valid"][0] <= ends["valid"][1] < ends["test"][0]
    assert dataset.rows("test") > 9000  # a tenth of the actions, but for new users' first ones


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "log.txt", tmp_path / "out"
    file.write_text("a 1 2 3 4\nb 2 3 4 5\n")

    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SequenceInfo, "write", fill_the_disk)
        with pytest.raises(ValueError, match=r"the disk of .*out is full"):
            prepare_sequences(SequenceSchema(), [file], out)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    left = tmp_path / f"out.{os.getpid()}.tmp"  # as of a process that was killed
    left.mkdir()
    (left / "users.arrow").write_text("half")
    prepare_sequences(SequenceSchema(), [file], out).verify()
    assert not left.exists()


@pytest.mark.parametrize(("time", "warns"), [(None, True), ("eventDate", False)])
def test_an_order_that_columns_might_know_better_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], time: str | None, warns: bool
) -> None:
    rows = [f"{user},{item},{4 - item},0.5" for user in range(4) for item in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,eventDate,sentiment", *rows]) + "\n")
    prepare_sequences(SequenceSchema(time=time), [tmp_path / "log.csv"], tmp_path / "prepared")
    assert (
        "no --schema.time is given; eventDate may hold times: --schema.time eventDate goes by"
        in capsys.readouterr().err
    ) == warns
