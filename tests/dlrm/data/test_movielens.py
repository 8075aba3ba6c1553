"""Interactions joined with users and items, against a join in plain Python, on small files and on the real ones."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from dlrm.data.dataset import Bags, Dataset
from dlrm.data.known import movielens_schema
from dlrm.data.prepare import prepare
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig
from dlrm.data.vocabulary import vocabulary_file


def read_typed(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [cell.rpartition(":")[0] for cell in next(rows)]
        return [dict(zip(names, row, strict=True)) for row in rows]


def read_back(dataset: Dataset, split: str) -> dict[str, list]:
    """Values of every feature, decoded by the dictionaries, and labels and times."""
    import pyarrow as pa

    found: dict[str, list] = {"label": [], "time": []}
    for feature in dataset.info.features:
        with pa.memory_map(str(vocabulary_file(dataset.folder, feature.name))) as file:
            values = ["<rare>", "<missing>", *pa.ipc.open_file(file).read_all()["value"].to_pylist()]
        found[feature.name] = []
        for index in range(len(dataset.info.splits[split])):
            ids = dataset.part(split, index).features[feature.name]
            if isinstance(ids, Bags):
                bags = zip(ids.offsets[:-1], ids.offsets[1:], strict=True)
                found[feature.name] += [[values[row] for row in ids.values[a:b]] for a, b in bags]
            else:
                found[feature.name] += [values[row] for row in ids]
    for index in range(len(dataset.info.splits[split])):
        found["label"] += dataset.part(split, index).label.tolist()
        found["time"] += dataset.part(split, index).extra["time"].tolist()
    return found


def test_real_movielens(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "ml-100k"
    dataset = prepare(movielens_schema(), [folder], tmp_path / "out", processes=1, block_bytes=300_000)
    users = {row["user_id"]: row for row in read_typed(folder / "ml-100k.user")}
    items = {row["item_id"]: row for row in read_typed(folder / "ml-100k.item")}
    rows = read_typed(folder / "ml-100k.inter")
    rows.sort(key=lambda row: int(row["timestamp"]))  # stable, as the source's order among equal times
    assert dataset.rows("train") == 79_999
    train, test = rows[:79_999], rows[79_999:]
    assert train[-1]["timestamp"] < test[0]["timestamp"]
    for split, expected in (("train", train), ("test", test)):
        found = read_back(dataset, split)
        assert found["time"] == [int(row["timestamp"]) for row in expected]
        assert found["label"] == [int(float(row["rating"]) >= 4) for row in expected]
        for name in ("user_id", "item_id", "age", "gender", "occupation", "zip_code", "release_year", "class"):
            known = {row[name] for row in (row | users[row["user_id"]] | items[row["item_id"]] for row in train)}
            tokens = {token for text in known for token in text.split(" ")} if name == "class" else known
            for value, row in zip(found[name], expected, strict=True):
                text = (row | users[row["user_id"]] | items[row["item_id"]])[name]
                pieces = [text] if name != "class" else [piece for piece in text.split(" ") if piece]
                wanted = [piece if piece in tokens else "<rare>" for piece in pieces] or ["<missing>"]
                if text == "":
                    wanted = ["<missing>"]
                assert (value if name == "class" else [value]) == wanted


SCHEMA = DataSchema(
    format="movielens",
    label="label",
    numeric=(NumericColumn(name="age", transform="none", missing_indicator=True),),
    categorical=(
        CategoricalColumn(name="user_id", min_count=1),
        CategoricalColumn(name="tags", min_count=1, is_list=True, separator=" "),
        CategoricalColumn(name="city", min_count=1),
    ),
    split=SplitConfig(valid=0, test=0),
)


def write_small(folder: Path, **changes: str) -> Path:
    folder.mkdir()
    texts = {
        "inter": "user_id:token\titem_id:token\tlabel:float\nu1\ti1\t1\nu2\ti9\t0\nu9\ti2\t1\n",
        "user": 'user_id:token\tage:float\tcity:token\nu2\t31\t"Ulm\nu1\t\tBonn\n',
        "item": "item_id:token\ttags:token_seq\ni2\tb c\ni1\t\n",
    } | changes
    for suffix, text in texts.items():
        (folder / f"small.{suffix}").write_text(text)
    return folder


def test_unknown_users_and_items_are_missing(tmp_path: Path) -> None:
    dataset = prepare(SCHEMA, [write_small(tmp_path / "in")], tmp_path / "out")
    part = dataset.part("train", 0)
    assert part.numeric.tolist() == [[0, 1], [31, 0], [0, 1]]  # u1 has no age, u9 is nobody
    assert part.label.tolist() == [1, 0, 1]
    tags = part.features["tags"]
    assert isinstance(tags, Bags)
    assert tags.values.tolist() == [1, 1, 2, 3]  # i1 has no tags, i9 is nobody, i2 has two
    assert tags.offsets.tolist() == [0, 1, 2, 4]
    assert part.features["city"].tolist() == [3, 2, 1]  # Bonn, "Ulm (a quotation mark is a character), missing


def test_interactions_file_is_enough(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "in")
    (folder / "small.item").unlink()
    with pytest.raises(
        ValueError, match=r"small\.inter: expected a column 'tags', found user_id, item_id, label, age, "
    ):
        prepare(SCHEMA, [folder / "small.inter"], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "user_id:token\tage\nu1\t3\n"}, r"small\.user, line 1: expected `name:type`.*got 'age'"),
        ({"user": "user_id:token\tage:number\nu1\t3\n"}, r"small\.user, line 1: expected `name:type`.*got 'age'"),
        (
            {"user": "user_id:token\tage:float\tcity:token\nu1\t3\ta\nu2\t4\tb\nu1\t5\tc\n"},
            r"small\.user, line 4: column 'user_id': expected each value once, got 'u1' again",
        ),
        (
            {"user": "user_id:token\tage:float\tcity:token\nu1\told\ta\n"},
            r"small\.user, line 2: column 'age': expected a number, got 'old'",
        ),
        (
            {"inter": "user_id:token\titem_id:token\tlabel:float\nu1\ti1\t1\nu1\ti2\n"},
            r"small\.inter, line 3: column 'item_id': expected 3 cells in the row, got 2",
        ),
    ],
)
def test_faults_are_named(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(SCHEMA, [write_small(tmp_path / "in", **changes)], tmp_path / "out")


def test_two_interaction_files_are_refused(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "in")
    (folder / "other.inter").write_text("a:token\n")
    with pytest.raises(ValueError, match=r"expected one \.inter file in .*other\.inter.*small\.inter; name one"):
        prepare(SCHEMA, [folder], tmp_path / "out")


def test_compressed_files_are_joined_too(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "in")
    whole = prepare(SCHEMA, [folder], tmp_path / "whole")
    for path in folder.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))
    again = prepare(SCHEMA, [folder], tmp_path / "again")
    assert again.info.splits == whole.info.splits
