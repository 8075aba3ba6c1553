"""Rows of (user, item, time) become each user's actions in the order of time, whatever the file and its blocks."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from contrastive.data.action_files import read_actions
from contrastive.data.sequence_schema import SequenceSchema
from contrastive.data.sequences import SequenceData

SCHEMA = SequenceSchema(format="csv", user="who", item="what", time="when")


def by_name(data: SequenceData) -> dict[str, list[str]]:
    names = np.array(data.items.to_pylist(), dtype=object)
    parts = np.split(data.actions, data.offsets[1:-1])
    return {user: names[part - 1].tolist() for user, part in zip(data.users.to_pylist(), parts, strict=True)}


def draw_rows(count: int, seed: int = 0) -> list[tuple[str, str, int]]:
    rng = np.random.default_rng(seed)
    users, items, times = rng.integers(0, 30, count), rng.integers(0, 50, count), rng.integers(0, 200, count)
    return [(f"user {user}", f"item-{item}", int(time)) for user, item, time in zip(users, items, times, strict=True)]


def expect(rows: list[tuple[str, str, int]]) -> dict[str, list[str]]:
    found = defaultdict(list)
    for user, item, time in rows:
        found[user].append((time, item))
    return {user: [item for _, item in sorted(pairs, key=lambda pair: pair[0])] for user, pairs in found.items()}


def write_csv(file: Path, rows: list[tuple[str, str, int]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("when", "what", "other", "who"), *((t, i, "x,y", u) for u, i, t in rows)])


def write_parquet(file: Path, rows: list[tuple[str, str, int]]) -> None:
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"who": users, "what": items, "when": times}), file, row_group_size=100)


@pytest.mark.parametrize("block_bytes", [512, 1 << 20])
@pytest.mark.parametrize("kind", ["csv", "parquet", "gz"])
def test_actions_in_the_order_of_time(tmp_path: Path, kind: str, block_bytes: int) -> None:
    rows = draw_rows(700)
    file = tmp_path / f"log.{'csv' if kind == 'gz' else kind}"
    write_parquet(file, rows) if kind == "parquet" else write_csv(file, rows)
    if kind == "gz":
        packed = file.with_suffix(".csv.gz")
        packed.write_bytes(gzip.compress(file.read_bytes()))
        file = packed
    schema = SequenceSchema(format="parquet" if kind == "parquet" else "csv", user="who", item="what", time="when")
    data = read_actions(schema, [file], block_bytes)
    assert by_name(data) == expect(rows)
    assert data.users.to_pylist() == list(dict.fromkeys(user for user, _, _ in rows))
    assert data.items.to_pylist() == list(dict.fromkeys(item for _, item, _ in rows))
    assert data.times is not None
    times = np.split(data.times, data.offsets[1:-1])
    assert all((np.diff(part) >= 0).all() for part in times)


def test_without_a_time_the_order_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = draw_rows(300)
    write_csv(tmp_path / "log.csv", rows)
    data = read_actions(SequenceSchema(format="csv", user="who", item="what"), [tmp_path / "log.csv"])
    assert data.times is None
    assert by_name(data) == expect([(user, item, 0) for user, item, _ in rows])


def test_a_label_says_which_actions_count(shared_data: Path) -> None:
    file = shared_data / "ml-100k" / "ml-100k.inter"
    columns = {"user": "user_id", "item": "item_id", "time": "timestamp"}
    every = read_actions(SequenceSchema(format="movielens", **columns), [file])
    liked = read_actions(SequenceSchema(format="movielens", **columns, label="rating", label_threshold=4.0), [file])
    with file.open() as stream:
        rows = [line.split("\t") for line in stream.read().splitlines()[1:]]
    assert by_name(every) == expect([(user, item, int(float(time))) for user, item, _, time in rows])
    chosen = [(user, item, int(float(time))) for user, item, rating, time in rows if float(rating) >= 4]
    assert by_name(liked) == expect(chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,what,when\na,x,1\n,x,2\n", r"log\.csv, line 3: column 'who': expected the name of a who, got nothing"),
        ("who,what,when\na,x,1\nb,,2\n", r"log\.csv, line 3: column 'what': expected the name of a what, got nothing"),
        ("who,what,when\na,x,1\nb,y,noon\n", r"log\.csv, line 3: column 'when': expected a time .*'noon'"),
        ("who,what,when\na,x,1\nb,y\n", r"log\.csv, line 3: .*expected 3 cells in the row, got 2"),
        ("who,what\na,x\n", r"log\.csv: expected a column 'when', found who, what; name the right one"),
        ("who,what,when\n", r"expected actions in .*log\.csv, found none"),
        ("", r"log\.csv: expected a header and rows, found an empty file"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_actions(SCHEMA, [file])
    assert "\n" not in str(caught.value)


def test_an_absent_user_of_a_parquet_file_is_found_in_its_row(tmp_path: Path) -> None:
    users = ["a", "b", None, "c"]
    pq.write_table(
        pa.table({"who": users, "what": [1, 2, 3, 4], "when": [1, 2, 3, 4]}), tmp_path / "log.parquet", row_group_size=2
    )
    schema = SequenceSchema(format="parquet", user="who", item="what", time="when")
    with pytest.raises(ValueError, match=r"log\.parquet, row 3: column 'who': expected the name of a who, got nothing"):
        read_actions(schema, [tmp_path / "log.parquet"])
