"""Lines of 'user item item ...' are read whole, and what is wrong with one is told with file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contrastive.data.line_format import read_lines
from contrastive.data.sequences import SequenceData


def as_dict(data: SequenceData) -> dict[str, list[int]]:
    parts = np.split(data.actions, data.offsets[1:-1])
    return {name: part.tolist() for name, part in zip(data.users.to_pylist(), parts, strict=True)}


def test_users_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_bytes(b"\xef\xbb\xbfzoe 3 1 2\n\n  ann\t7   7 \r\n1 5")
    data = read_lines([file])
    assert list(as_dict(data).items()) == [("zoe", [3, 1, 2]), ("ann", [7, 7]), ("1", [5])]
    assert data.items.to_pylist() == ["1", "2", "3", "4", "5", "6", "7"]
    assert data.times is None
    assert read_lines([file], num_items=9).num_items == 9


def test_several_files_and_packed_ones(tmp_path: Path) -> None:
    (tmp_path / "part_10.txt").write_text("c 3\n")
    (tmp_path / "part_9.txt.gz").write_bytes(gzip.compress(b"a 1 2\nb 2\n"))
    (tmp_path / "part_2.txt").write_text("d 4\n")
    assert as_dict(read_lines([tmp_path / "part*"])) == {"d": [4], "a": [1, 2], "b": [2], "c": [3]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a 1 2\nb 3 x4 5\n", r"line 2: expected numbers of items \(1, 2, \.\.\.\), got 'x4'; correct the line"),
        (b"a 1 2\nb 3 -4 5\n", r"line 2: expected numbers of items .* got '-4'"),
        (b"a 1 2\nb 3 4.0\n", r"line 2: expected numbers of items .* got '4\.0'"),
        (b"a 1,2,3\n", r"line 1: expected numbers of items .* got '1,2,3'"),
        (
            b"a 1\n\nb\nc 2\n",
            r"line 3: expected a user and at least one item, got one word; correct or remove the line",
        ),
        (b"a 1 2\nb 0 3\n", r"line 2: expected items from 1 to 2147483647, got 0; correct it"),
        (b"a 1 2\nb 99999999999999999999 3\n", r"line 2: expected items from 1 to \d+, got 99999999999999999999"),
        (b"a 1 2\nb 3\na 4 5\n", r"line 3: expected each user on one line, got 'a' again, first in .*line 1; join"),
        (b"a 1 2\n\xff 3\n", r"line 2: expected text in UTF-8, got b'\\xff'; convert it"),
        (b"", r"broken\.txt: expected lines 'user item item \.\.\.', found an empty file"),
        (b"a 1 2\nb 2 " + b"9" * 5000, r"line 2: expected items from 1 to 2147483647, got 9{40}; correct it"),
        (b"a 1 2\nb 2 1500000000\n", r"line 2: expected items numbered from 1, got 1500000000 in a source of 4 act"),
        (b"\n \n\n", r"expected lines 'user item item \.\.\.' in .*, found none"),
        (b"a 1\x00\x002\n", r"expected text in UTF-8, got zero bytes"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "broken.txt"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_lines([file])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_item_outside_the_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text("a 1 2\nb 12 13\n")
    assert read_lines([file], num_items=13).num_items == 13
    message = r"log\.txt, line 2: expected items from 1 to 12, got 13; raise --schema.num-items, or correct the line"
    with pytest.raises(ValueError, match=message):
        read_lines([file], num_items=12)


def test_a_file_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "log.txt.gz"
    file.write_bytes(gzip.compress(b"".join(b"%d 1 2 3\n" % user for user in range(1000)))[:-40])
    with pytest.raises(ValueError, match=r"log\.txt\.gz is damaged or cut short"):
        read_lines([file])


@given(
    text=st.lists(st.sampled_from(["a", "b", "c1", " ", "\n", "\t", "0", "1", "23", "-", "é", "\r\n", "_", "."])).map(
        "".join
    )
)
@settings(max_examples=80, deadline=None)
def test_any_text_is_read_as_it_stands_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "log.txt"
    file.write_bytes(text.encode())
    rows = [line.split() for line in text.split("\n") if line.split()]
    is_number = [all(cell.isascii() and cell.isdigit() and int(cell) > 0 for cell in row[1:]) for row in rows]
    is_fine = bool(rows) and all(len(row) > 1 for row in rows) and all(is_number)
    if is_fine and len({row[0] for row in rows}) == len(rows):
        assert as_dict(read_lines([file])) == {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    else:
        with pytest.raises(ValueError, match=r"expected"):
            read_lines([file])
