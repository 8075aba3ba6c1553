"""The programs in the documentation run as they are printed, and the flags and files that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_programs_run_as_printed(page: str, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    auc = re.search(r"0\.\d+", result.stdout)
    assert auc is not None
    assert float(auc[0]) > 0.6
    assert list(tmp_path.glob("runs/*/summary.json"))


def test_the_notebook_program_runs_as_printed(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "parameter_servers.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "loss 0.000000, rows 3"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "train synthetic",
        "train mclrec",
        "plan synthetic",
        "study batch-size synthetic",
        "study learning-rate synthetic",
        "study curvature",
        "prepare",
        "init",
        "report",
        "export",
        "recommend",
        "nearest",
        "doctor",
        "ps coordinator",
        "ps shard",
        "ps trainer synthetic",
        "ps certificates",
        "ps status",
        "ps drain",
        "ps snapshot",
    ):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
    main(["ps", "up", "synthetic", "--help"])
    known = set(re.findall(r"--[a-z][a-z.-]+", capsys.readouterr().out)) | {"--help", "--version"}
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not re.search(r"pip |make |benchmarks|torchrun |srun ", line))
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z.-]+[a-z]", text):
            assert any(name == flag or name.startswith(f"{flag}.") for name in known), f"{page.name}: {flag}"
