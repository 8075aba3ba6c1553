"""The `recforge` command: what it offers, and that asking it for help loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy import __version__
from deploy.cli import COMMANDS, main

HEAVY = ("torch", "torchrec", "fbgemm_gpu", "numba", "polars", "pyarrow", "numpy", "tyro", "plotly", "tensorboard")
REPOSITORY = Path(__file__).resolve().parents[2]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = "\n".join(
        [
            "import sys",
            "from deploy.cli import main",
            "try:",
            "    main(['--help'])",
            "finally:",
            f"    print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert all(f"    {name} " in done.stdout for name in ("train", "prepare", "init", "report", "doctor"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"recforge {__version__}\n"


def test_every_command_can_be_imported() -> None:
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}; assert callable({module}.{function})"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
