"""The Makefile's set-up, with a stand-in for Python that only writes down how it was called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, TEST = ".venv/.train", ".venv/.test"
PYTEST = "python -m pytest -q -n 2 --dist loadfile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# As `python -m venv DIR` it leaves copies of itself in DIR; whatever else it is asked, it does nothing and says yes.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in "-m venv"*)
  mkdir -p .venv/bin
  for name in python recforge ruff mypy lint-imports; do cp "$0" .venv/bin/$name; done
esac
exit 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that set-up looks at, and `python3` stood in for."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "deploy/doctor.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(STAND_IN)
    (tmp_path / "bin" / "python3").chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str) -> list[str]:
    """Run make; return the calls that were made of the stand-in."""
    calls = checkout / "calls"
    calls.write_text("")
    environment = {"PATH": f"{checkout / 'bin'}:/usr/bin:/bin", "CALLS": str(calls)}
    subprocess.run(["make", *arguments], cwd=checkout, env=environment, check=True, capture_output=True, timeout=60)
    return [call.rstrip() for call in calls.read_text().splitlines()]


def test_train_sets_up_once(checkout: Path) -> None:
    calls = make(checkout, "train", "ARGS=--seed 3")
    assert "python3 -m venv --clear .venv" in calls
    assert any(call.endswith("install --no-warn-conflicts -c constraints.txt -e .") for call in calls)
    assert calls[-2:] == ["recforge doctor --fix", "recforge train synthetic --seed 3"]
    assert make(checkout, "train") == ["recforge train synthetic"], "the second time there is nothing to set up"


def test_test_sets_up_once_and_covers_train(checkout: Path) -> None:
    calls = make(checkout, "test")
    assert any(call.endswith("install --no-warn-conflicts -c constraints.txt -e .[test]") for call in calls)
    checks = ["ruff check .", "ruff format --check .", "mypy", "lint-imports --no-logo", PYTEST]
    assert calls[-5:] == checks
    assert make(checkout, "test") == checks
    assert make(checkout, "train") == ["recforge train synthetic"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "deploy/doctor.py"])
def test_a_change_of_what_is_pinned_sets_up_again(changed: str, checkout: Path) -> None:
    make(checkout, TRAIN)
    later = (checkout / TRAIN).stat().st_mtime + 10
    os.utime(checkout / changed, (later, later))
    calls = make(checkout, TRAIN)
    assert any("install --no-warn-conflicts -c constraints.txt" in call for call in calls)
    assert not any("-m venv" in call for call in calls), "the environment itself stays"


def test_a_deleted_environment_is_made_again(checkout: Path) -> None:
    make(checkout, TEST)
    shutil.rmtree(checkout / ".venv")
    assert "python3 -m venv --clear .venv" in make(checkout, TEST)


def test_without_python_one_line_says_what_is_missing(checkout: Path) -> None:
    (checkout / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    for name in ("mkdir", "touch"):
        (checkout / "bin" / name).symlink_to(str(shutil.which(name)))
    command = [str(shutil.which("make")), "train"]
    done = subprocess.run(
        command,
        cwd=checkout,
        env={"PATH": str(checkout / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "Python >= 3.10" in line] == [done.stderr.splitlines()[0]]
