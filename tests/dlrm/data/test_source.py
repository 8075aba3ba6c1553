"""Files are found in natural order, and every block begins and ends with whole rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.data.criteo import find_criteo
from dlrm.data.source import TextBlocks, TextForm, find_files, last_row_end

CRITEO_ROW = "\t".join(["1", *["5"] * 13, *["0a1b2c3d"] * 26]) + "\n"


def names(files: tuple[Path, ...]) -> list[str]:
    return [file.name for file in files]


def test_days_are_in_natural_order(tmp_path: Path) -> None:
    for day in (10, 2, 0, 1, 23):
        (tmp_path / f"day_{day}.gz").write_text("x")
    expected = ["day_0.gz", "day_1.gz", "day_2.gz", "day_10.gz", "day_23.gz"]
    assert names(find_files([tmp_path], ("day_*",))) == expected
    assert names(find_files([tmp_path / "day_*"], ())) == expected
    assert names(find_files([tmp_path / "day_2.gz", tmp_path / "day_0.gz"], ())) == ["day_2.gz", "day_0.gz"]


def test_hidden_files_and_markers_are_left_out(tmp_path: Path) -> None:
    for name in ("a.parquet", "_SUCCESS.parquet", ".crc.parquet", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.parquet").write_text("x")
    assert names(find_files([tmp_path], ("*.parquet",))) == ["a.parquet", "b.parquet"]


def test_a_criteo_folder_gives_its_training_files(tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt", "readme.txt"):
        (tmp_path / name).write_text(CRITEO_ROW)
    assert [file.name for file, _ in find_criteo([tmp_path])] == ["train.txt"]
    for name in ("train.txt", "test.txt", "readme.txt"):
        (tmp_path / name).unlink()
    for day in (0, 11, 2):
        (tmp_path / f"day_{day}").write_text(CRITEO_ROW)
    assert [file.name for file, _ in find_criteo([tmp_path])] == ["day_0", "day_2", "day_11"]


@given(st.lists(st.tuples(st.booleans(), st.text('ab,\n"', max_size=8)), min_size=1), st.integers(1, 80))
def test_last_row_end_is_outside_of_quotes(cells: list[tuple[bool, str]], length: int) -> None:
    """Against a scanner that looks at one character at a time."""
    plain = str.maketrans("", "", ',\n"')
    text = "".join(
        '"' + cell.replace('"', '""') + '"\n' if quoted else cell.translate(plain) + "\n" for quoted, cell in cells
    )[:length]
    end, inside = 0, False
    for place, character in enumerate(text):
        inside ^= character == '"'
        if character == "\n" and not inside:
            end = place + 1
    assert last_row_end(text.encode(), quoted=True) == end
    assert last_row_end(text.encode(), quoted=False) == text.rfind("\n") + 1


@pytest.mark.parametrize("block_bytes", [17, 64, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blocks_make_up_the_file(block_bytes: int, end: str, tmp_path: Path) -> None:
    rows = [f"{number},{'x' * (number % 7)}{end}" for number in range(200)]
    path = tmp_path / "a.csv"
    path.write_bytes(("a,b" + end + "".join(rows)).encode())
    form = TextForm(columns=("a", "b"), delimiter=",", quoted=True, has_header=True)
    blocks = list(TextBlocks([(path, form)], block_bytes=block_bytes, scratch=tmp_path, is_done=lambda _: False))
    texts = [path.read_bytes()[block.start : block.stop].decode() for block in blocks]
    assert "".join(texts) == "".join(rows)
    assert all(text.endswith("\n") for text in texts)
    assert [block.first_line for block in blocks] == [
        2 + sum(text.count("\n") for text in texts[:place]) for place in range(len(texts))
    ]
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert sum(block.share for block in blocks) == pytest.approx(1.0)
    assert max(map(len, texts)) <= block_bytes
