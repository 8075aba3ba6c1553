"""Names and versions that stand in more than one file agree, and the wheel holds our packages and nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deploy import __version__, doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = [
    name
    for name in ("deploy", "contrastive", "dlrm", "parameter_server", "embeddings")
    if (REPOSITORY / name / "__init__.py").is_file()
]


def read_pyproject() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


def test_every_package_is_built_typed_and_its_imports_are_checked() -> None:
    tool = read_pyproject()["tool"]
    assert sorted(tool["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(PACKAGES)
    assert sorted(tool["importlinter"]["root_packages"]) == sorted(PACKAGES)
    with_benchmarks = [*PACKAGES, *(["benchmarks"] if (REPOSITORY / "benchmarks").is_dir() else [])]
    assert sorted(tool["mypy"]["files"]) == sorted(with_benchmarks)


def test_direct_dependencies_are_pinned_and_constraints_agree() -> None:
    project = read_pyproject()["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z0-9._-]+==[^ ;\n]+)", constraints, re.MULTILINE))
    for requirement in requirements:
        pin = re.sub(r"\[.*\]", "", requirement.split(";")[0].strip())
        assert re.fullmatch(r"[a-z0-9._-]+==[0-9][^ ]*", pin), f"not pinned: {requirement}"
        assert pin in pinned or pin.startswith("torch=="), f"`make constraints` was not run after changing {pin}"
    assert "://" not in constraints


def test_the_doctor_knows_the_versions_that_are_pinned() -> None:
    dependencies = read_pyproject()["project"]["dependencies"]
    assert f"torch=={doctor.TORCH}" in dependencies
    for name, version in doctor.LIGHT_NEEDS.items():
        assert f"{name}=={version}" in dependencies
    names = {requirement.partition("==")[0] for requirement in dependencies}
    assert names.isdisjoint({"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"}), "the doctor installs these"


# torchrec imports the first three, torch.utils.tensorboard the next one, `import_module` rocksdict, which has no types,
# and pytorch-metric-learning the last
IMPORTED_ELSEWHERE = {"tensordict", "torchmetrics", "pyre-extensions", "tensorboard", "rocksdict", "scikit-learn"}
# Packages that are imported by another name than they are installed by.
INSTALLED_AS = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
}
EXTRAS = ("ps", "spill", "contrastive", "study")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    imported = set()
    for package in PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    third_party = {INSTALLED_AS.get(name, name.replace("_", "-")) for name in foreign}
    project = read_pyproject()["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    declared = {line.partition("==")[0] for line in lines}
    installed_by_the_doctor = {"torchrec", "fbgemm-gpu"}
    assert third_party - installed_by_the_doctor == declared - (IMPORTED_ELSEWHERE - third_party)


def test_the_page_on_dependencies_says_what_each_earns() -> None:
    page = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| ([a-z0-9, -]+) \|", page, re.MULTILINE) for name in row.split(", ")}
    project = read_pyproject()["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    expected = {re.split(r"==|\[", line)[0] for line in declared} | {"torchrec", "fbgemm", "timm"}
    assert named - {"package"} == expected


@pytest.mark.long
@pytest.mark.timeout(900)
def test_pip_install_from_the_checkout_gives_a_working_command(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=600
        ).stdout

    run(sys.executable, "-m", "venv", "env")
    python, recforge = str(tmp_path / "env/bin/python"), str(tmp_path / "env/bin/recforge")
    run(python, "-m", "pip", "-qq", "wheel", "--no-deps", "-w", ".", str(REPOSITORY))
    [wheel] = tmp_path.glob("recforge-*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {*PACKAGES, f"recforge-{__version__}.dist-info"}

    run(python, "-m", "pip", "-qq", "install", str(REPOSITORY))
    assert run(recforge, "doctor", "--fix").splitlines()[-1] == "everything fits"
    assert run(recforge, "doctor").splitlines()[-1] == "everything fits"
    assert run(recforge, "--version") == f"recforge {__version__}\n"
