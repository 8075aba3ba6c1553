"""What is wrong with a source of sequences ends `recforge train` with one line that says where, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.cli import main

ROWS = "".join(f"u{row // 4},i{row % 4},{row}\n" for row in range(8))
ITEMS = ("--schema.items.files", "items.csv", "--schema.items.columns", "brand")
FILES = {
    "outside.txt": b"a 1 2 3 4\nb 2 3 9 5\n",
    "few.txt": b"a 1 2\nb 2\n",
    "word.txt": b"a 1 2 3 4\nb 2 x 3 5\n",
    "alone.txt": b"a 1 2 3 4\nb\n",
    "empty.txt": b"",
    "blank.txt": b"\n \n",
    "fine.csv": f"user,item,time\n{ROWS}".encode(),
    "short.csv": b"user,item,time\nu,i,1\nu,j\nu,k,3\n",
    "late.csv": b"user,item,time\nu,i,1\nu,j,soon\nu,k,3\n",
    "items.csv": b"item,colour\ni1,red\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all files, which is the present one."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    table = pa.table({"user": ["u"] * 5, "item": ["i", "j", "k", "l", "m"], "time": [3.0, 1.0, None, 5.0, 2.0]})
    pq.write_table(table, tmp_path / "untimed.parquet")
    pq.write_table(table.drop_columns(["item"]), tmp_path / "itemless.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "untimed.parquet").read_bytes()[:-100])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("outside.txt", "--schema.num-items", "8"), "outside.txt, line 2: expected items from 1 to 8, got 9"),
        (("few.txt",), "expected samples in every part, got train 0, valid 0, test 0 from 2 users, 0 of whom have 3"),
        (("word.txt",), "word.txt, line 2: expected numbers of items (1, 2, ...), got 'x'"),
        (("alone.txt",), "alone.txt, line 2: expected a user and at least one item, got one word"),
        (("empty.txt",), "empty.txt: expected lines 'user item item ...', found an empty file"),
        (("blank.txt",), "expected lines 'user item item ...' in blank.txt, found none"),
        (("absent.txt",), "expected a file, a folder or a pattern, found no files at absent.txt"),
        (("itemless.parquet",), "itemless.parquet: expected a column 'item', found user, time"),
        (("cut.parquet",), "cut.parquet cannot be read as parquet"),
        (("untimed.parquet", "--schema.time", "time"), "untimed.parquet, row 3: column 'time': expected a time, got"),
        (("short.csv",), "short.csv, line 3: column 'item': expected 3 cells in the row, got 2"),
        (("late.csv", "--schema.time", "time"), "late.csv, line 3: column 'time': expected a time (a number, or like"),
        (("fine.csv", "--schema.split.by", "time"), "expected times of the actions, got none; name their column by"),
        (("fine.csv", *ITEMS), "items.csv: expected a column 'brand', found item, colour"),
        (("fine.csv", *ITEMS[:3], "colour"), "items.csv: expected rows of items of the catalogue"),
    ],
)
def test_one_line_and_nothing_left(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    if "colour" in flags:
        (folder / "items.csv").write_text("item,colour\nhat,red\n")
    assert main(["train", "sasrec", "--data", *flags, "--output", "run", "--step.threads", "1"]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert line.startswith("recforge: error: ")
    assert told in line
    assert not out
    assert not (folder / "run").exists()
    assert [path for path in (folder / "datasets").glob("*") if path.suffix != ".lock"] == []
    assert (folder / flags[0]).exists() == (flags[0] != "absent.txt")


def test_what_can_be_left_out_is_told_and_the_rest_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"u{user} {' '.join(str(1 + (user * step) % 7) for step in range(1, 7))}\n" for user in range(20)]
    (folder / "mixed.txt").write_text("".join([*lines[:9], "short 3 9\n", *lines[9:]]))
    (folder / "items.csv").write_text("item,brand,price\n1,A,2.50\n2,A,3.75\n")
    flags = ("--epochs", "1", "--dim", "16", "--step.threads", "1", "--guards.chance-evaluations", "0")
    assert main(["train", "sasrec", "--data", "mixed.txt", *ITEMS, "price", "--output", "run", *flags]) == 0
    told = capsys.readouterr().err
    short = "1 of 21 users have fewer than 3 actions (the first is 'short', with 2): they are neither learned"
    assert f"mixed.txt, line 10: {short}" in told
    assert "1 of the 9 numbers of items do not occur" in told
    assert "--schema.items: no value of 'price' is one of 2 items or more" in told
    assert "no value of 'brand'" not in told
    assert "7 of 9 items are not in the files of items; their features are absent" in told


@pytest.mark.parametrize("command", ["train", "ps up", "ps trainer"])
def test_a_mistyped_recipe_lists_those_of_sequences_and_of_clicks(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "mclrec-beutyy"]) == 2
    told = capsys.readouterr().err
    assert "criteo-kaggle" in told
    assert "mclrec-beauty, " in told
    assert "got 'mclrec-beutyy'" in told


@pytest.mark.parametrize("command", ["plan", "study batch-size"])
def test_commands_that_know_clicks_alone_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "sasrec"]) == 2
    assert "of clicks or a configuration file (*.toml), got 'sasrec'" in capsys.readouterr().err
