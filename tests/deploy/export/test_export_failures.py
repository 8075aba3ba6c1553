"""An export is there whole or not at all, whatever is wrong, and whenever it is killed; what is wrong is one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from deploy.export import ExportArguments, export


def _empty(run: Path, output: Path) -> list[str]:
    return [str(run.parent), "--output", str(output)]


def _no_checkpoint(run: Path, output: Path) -> list[str]:
    shutil.rmtree(run / "checkpoints" / "samples-000000000005")
    return [str(run), "--output", str(output)]


def _no_config(run: Path, output: Path) -> list[str]:
    (run / "config.json").unlink()
    return [str(run), "--output", str(output)]


def _no_best(run: Path, output: Path) -> list[str]:
    return [str(run), "--best", "--output", str(output)]


def _best_of_one(run: Path, output: Path) -> list[str]:
    return [str(run / "checkpoints" / "samples-000000000005"), "--best", "--output", str(output)]


def _output_is_a_file(run: Path, output: Path) -> list[str]:
    output.write_text("mine")
    return [str(run), "--output", str(output)]


def _output_is_full(run: Path, output: Path) -> list[str]:
    output.mkdir()
    (output / "mine").touch()
    return [str(run), "--output", str(output)]


def _output_in_a_file(run: Path, output: Path) -> list[str]:
    return [str(run), "--output", str(run / "config.json" / "out")]


def _no_such_source(run: Path, output: Path) -> list[str]:
    return [str(run / "nowhere"), "--output", str(output)]


def _no_output(run: Path, output: Path) -> list[str]:
    return [str(run)]


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (_empty, "expected the folder of a run or a checkpoint, got "),
        (_no_such_source, "expected the folder of a run or a checkpoint, got "),
        (_no_checkpoint, "expected a checkpoint in "),
        (_no_config, "which says what the tables of "),
        (_no_best, "expected a checkpoint that was the best in "),
        (_best_of_one, "--best: expected the folder of a run to choose from, got the checkpoint "),
        (_output_is_a_file, "expected --output to be a new folder, got "),
        (_output_is_full, "expected --output to be a new folder, got "),
        (_output_in_a_file, "make room there or choose another --output"),
        (_no_output, "--output"),
    ],
)
def test_whatever_is_wrong_is_one_line(
    prepare: Callable[[Path, Path], list[str]],
    complaint: str,
    rank_checkpoints: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(2, "row_wise"))
    argv = prepare(run, tmp_path / "out")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert main(["export", *argv]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("recforge: error: ")
    assert complaint in line
    assert said.out == ""
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(
    rank_checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(2, "row_wise"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlrm.checkpoints.tensor_file.write_tensors", fail)
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "--output" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# Imports once, and forks an export for each number it is told, which dies before so many operations on its folder.
DYING = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import safetensors.torch, torch, dlrm.checkpoints.checkpoint
    from deploy.export import ExportArguments, export

    def die_at(operation):
        left = [operation]
        def count(event, arguments):
            if any(isinstance(a, (str, os.PathLike)) and ".writing-" in os.fspath(a) for a in arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            die_at(int(line))
            export(ExportArguments(source=Path("run"), output=Path("out")))
            os._exit(0)
        print(os.WIFSIGNALED(os.waitpid(child, 0)[1]), flush=True)
    """
)


def test_killed_before_any_operation_it_leaves_nothing_under_its_name(
    rank_checkpoints: Any, read_bytes: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    run = rank_checkpoints.write(tmp_path / "run", rank_checkpoints.plan(3, "row_wise"))
    export(ExportArguments(source=run, output=tmp_path / "expected"))
    expected, output = read_bytes(tmp_path / "expected"), tmp_path / "out"
    (tmp_path / ".writing-other").mkdir()  # somebody else's
    kills = partly_written = 0
    command = [sys.executable, "-c", DYING]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        killed = True
        while killed:
            kills += 1
            print(kills, file=process.stdin, flush=True)
            killed = process.stdout.readline() == "True\n"
            half = [path for path in tmp_path.glob(".writing-out*") if any(path.iterdir())]
            partly_written += bool(half)
            assert len(half) <= 1  # that of the kill before is removed
            if output.exists():
                assert read_bytes(output) == expected
                assert not killed or not half
                shutil.rmtree(output)
            else:
                assert killed
    assert kills > 12
    assert partly_written > 6
    assert [path.name for path in tmp_path.glob(".writing*")] == [".writing-other"]
