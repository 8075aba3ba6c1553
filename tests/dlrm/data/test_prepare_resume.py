"""A `prepare` that is killed, at any moment and however often, goes on and gives the same bytes."""

from __future__ import annotations

import dataclasses
import gzip
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dlrm.data.dataset import Dataset
from dlrm.data.known import known_schema
from dlrm.data.prepare import WORK, prepare, source_identity
from dlrm.data.provide import provide_dataset
from dlrm.data.schema import CategoricalColumn, DataSchema, NumericColumn, SplitConfig

SCHEMA = DataSchema(
    format="csv",
    label="click",
    time="when",
    numeric=(NumericColumn(name="n", transform="quantile"),),
    categorical=(
        CategoricalColumn(name="a"),
        CategoricalColumn(name="b", min_count=1, is_list=True, separator=" "),
    ),
    split=SplitConfig(by="time", valid=0.2, test=0.2),
)
BLOCK_BYTES = 1500


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("source") / "rows.csv"
    lines = [
        f"{draw.randint(0, 10**6)},{draw.randint(0, 1)},{draw.random()},u{draw.randint(0, 20)},x z{draw.randint(0, 9)}"
        for _ in range(200)
    ]
    path.write_text("when,click,n,a,b\n" + "\n".join(lines))
    return path


def files(dataset: Dataset) -> dict[str, bytes]:
    return {
        str(path.relative_to(dataset.folder)): path.read_bytes()
        for path in dataset.folder.rglob("*")
        if path.is_file() and path.name != "prepared_from.json"
    }


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("compressed", [False, True])
def test_stopped_again_and_again(
    compressed: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt writes three or four files, as many as one task does, so it ends only if what is done is kept."""
    if compressed:
        (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(source.read_bytes()))
        source = tmp_path / "rows.csv.gz"
    whole = prepare(SCHEMA, [source], tmp_path / "whole", processes=1, block_bytes=BLOCK_BYTES)
    replace, left = os.replace, 0

    def replace_and_stop(*paths: Path) -> None:
        nonlocal left
        if Path(paths[1]).name != "prepared_from.json":
            if not left:
                raise Killed
            left -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_and_stop)
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 100
        left = 3 + attempts % 2
        try:
            again = prepare(SCHEMA, [source], tmp_path / "again", processes=1, block_bytes=BLOCK_BYTES)
        except Killed:
            assert not (tmp_path / "again" / "dataset.json").exists()
        else:
            break
    assert attempts > 10
    assert files(again) == files(whole)
    assert not (tmp_path / "again" / WORK).exists()


def run_cli(source: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "dlrm", "prepare", str(source), str(out), "--recipe", "criteo-kaggle-sample"]
    return subprocess.Popen(
        [*command, "--processes", "2", "--block-bytes", "60000"],
        cwd=Path(__file__).parents[3],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_killed_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(time.time_ns())
    source = tmp_path / "train.txt"
    numbers = random.Random(1)
    with source.open("w") as file:
        for _ in range(4000):
            counts = [str(numbers.randint(0, 99)) for _ in range(13)]
            ids = [f"{int(numbers.paretovariate(0.5)) % 2**32:08x}" for _ in range(26)]
            file.write("\t".join([str(numbers.randint(0, 1)), *counts, *ids]) + "\n")
    whole = prepare(known_schema("criteo-kaggle-sample"), [source], tmp_path / "whole", processes=1, block_bytes=60_000)
    out, kills, longest = tmp_path / "again", 0, 0.6
    while True:
        process = run_cli(source, out)
        try:
            process.wait(draw.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, longest = kills + 1, longest * 1.25  # grows, so that the end is reached on a slow machine too
            _, alive = psutil.wait_procs(started, timeout=20)
            assert not alive, "a worker outlived its parent"
        else:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        finally:
            process.stderr.close()
    assert kills >= 1
    again = Dataset(out)
    again.verify()
    assert files(again) == files(whole)


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    def start_another(stage: str, share: float, rows: int) -> None:
        with pytest.raises(ValueError, match="is being prepared by another process"):
            prepare(SCHEMA, [source], tmp_path / "out", processes=1, progress=lambda *_: None)

    prepare(SCHEMA, [source], tmp_path / "out", processes=1, progress=start_another)


def test_a_changed_source_is_not_mixed_with_the_old_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "rows.csv"
    copy.write_bytes(source.read_bytes())

    def stop(stage: str, share: float, rows: int) -> None:
        if stage == "count":
            raise Killed

    with pytest.raises(Killed):
        prepare(SCHEMA, [copy], tmp_path / "out", processes=1, progress=stop)
    copy.write_bytes(source.read_bytes().replace(b"u1,", b"u2,"))
    with pytest.raises(ValueError, match="other input"):
        prepare(SCHEMA, [copy], tmp_path / "out", processes=1)


def test_identity_follows_schema_and_files_but_not_where_they_lie(source: Path, tmp_path: Path) -> None:
    known = {source_identity(SCHEMA, [source])}
    moved = tmp_path / "elsewhere" / source.name
    moved.parent.mkdir()
    shutil.copy2(source, moved)
    assert source_identity(SCHEMA, [moved]) in known
    known.add(source_identity(dataclasses.replace(SCHEMA, split=SplitConfig(by="time", valid=0.1)), [moved]))
    os.utime(moved)
    known.add(source_identity(SCHEMA, [moved]))
    moved.write_bytes(source.read_bytes() + b"\n")
    known.add(source_identity(SCHEMA, [moved]))
    assert len(known) == 4


def test_touched_files_are_prepared_anew(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has not been chosen by the user, who cannot be asked to choose another."""
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "rows.csv"
    copy.write_bytes(source.read_bytes())
    first = provide_dataset((SCHEMA, (copy,)), None)
    assert provide_dataset((SCHEMA, (copy,)), None).folder == first.folder
    os.utime(copy, ns=(1, 1))
    again = provide_dataset((SCHEMA, (copy,)), None)
    assert again.folder != first.folder
    assert again.fingerprint == first.fingerprint
