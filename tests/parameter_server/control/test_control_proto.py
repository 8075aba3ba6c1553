"""The generated gRPC code is what `make proto` writes from control.proto."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    (line,) = (
        line for line in (REPOSITORY / "Makefile").read_text(encoding="utf-8").splitlines() if "grpc_tools" in line
    )
    arguments = line.split("-m ")[1].replace("=.", f"={tmp_path}").split()
    subprocess.run([sys.executable, "-m", *arguments], cwd=REPOSITORY, check=True, timeout=60)
    made = sorted((tmp_path / "parameter_server" / "control").iterdir())
    assert [file.name for file in made] == ["control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py"]
    for file in made:
        assert file.read_text() == (REPOSITORY / "parameter_server" / "control" / file.name).read_text(), (
            "run `make proto`"
        )
