"""A study that is killed at any moment goes on where it was: nothing is computed twice, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dlrm.analysis.study.study_folder import StudyFolder, read_trials

# Counts how often each trial is begun, in a file that no kill can undo; dies in the middle of the one it is told.
PROGRAM = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from dlrm.analysis.study.study_folder import StudyFolder
    folder, deadly = Path(sys.argv[1]), int(sys.argv[2])

    def compute(number):
        with (folder / "begun").open("a") as file:
            file.write(f"{number} ")
        if number == deadly:
            (folder / "trials.jsonl").open("a").write('{"trial": "' + str(number))  # half a line, as of a full buffer
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": number * number, "nothing": float("nan")}

    with StudyFolder(folder, kind="toy", settings={"a": 1}, total=6) as study:
        for number in range(6):
            study.trial(str(number), lambda: compute(number))
    """
)


def run(folder: Path, deadly: int) -> int:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(deadly)]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode


def test_what_was_killed_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    assert run(folder, 2) == -signal.SIGKILL
    assert list(read_trials(folder)) == ["0", "1"]
    before = (folder / "trials.jsonl").read_bytes()
    assert run(folder, 4) == -signal.SIGKILL
    assert run(folder, -1) == 0
    assert (folder / "begun").read_text().split() == ["0", "1", "2", "2", "3", "4", "4", "5"]
    lines = (folder / "trials.jsonl").read_bytes()
    assert lines.startswith(before[: before.rfind(b"\n") + 1])
    records = [json.loads(line) for line in lines.splitlines()]
    assert [record["trial"] for record in records] == [str(number) for number in range(6)]
    assert [record["square"] for record in records] == [0, 1, 4, 9, 16, 25]
    assert {record["nothing"] for record in records} == {None}


def test_a_trial_that_fails_is_not_recorded(tmp_path: Path) -> None:
    def fail() -> dict[str, float]:
        raise ValueError("no")

    with (
        StudyFolder(tmp_path / "study", kind="toy", settings={}, quiet=True) as study,
        pytest.raises(ValueError, match="no"),
    ):
        study.trial("a", fail)
    assert read_trials(tmp_path / "study") == {}


def test_other_settings_are_another_study(tmp_path: Path) -> None:
    with StudyFolder(tmp_path, kind="toy", settings={"space": {"rate": [1, 2]}}, quiet=True) as study:
        study.trial("a", lambda: {"x": 1})
    other = StudyFolder(tmp_path, kind="toy", settings={"space": {"rate": [1, 3]}}, quiet=True)
    with pytest.raises(ValueError, match=r"--output: .* holds a study with space.rate = \[1, 2\], got \[1, 3\]"):
        other.__enter__()
    with StudyFolder(tmp_path, kind="toy", settings={"space": {"rate": (1, 2)}}, quiet=True) as study:
        assert study.trial("a", lambda: pytest.fail("computed again"))["x"] == 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        StudyFolder(tmp_path, kind="toy", settings={}, quiet=True),
        pytest.raises(ValueError, match="another process is at the study"),
    ):
        StudyFolder(tmp_path, kind="toy", settings={}, quiet=True).__enter__()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text('{"trial": "a"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"trials.jsonl, line 2: expected a trial as JSON"):
        read_trials(tmp_path)
    assert os.listdir(tmp_path) == ["trials.jsonl"]
