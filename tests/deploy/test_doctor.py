"""The doctor's verdict and cure for every misfit, on site-packages folders made up for the purpose."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deploy import doctor

CPU = doctor.Machine(driver_cuda=None)
GPU = doctor.Machine(driver_cuda=(13, 1))
OLD_GPU = doctor.Machine(driver_cuda=(12, 8))
NEEDS = dict(doctor.LIGHT_NEEDS)


def fabricate(site: Path, versions: dict[str, str], cuda: str | None, variant: str | None) -> doctor.Installation:
    """Write metadata and version files as wheels leave them, then read them back."""
    for name, version in versions.items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if "torch" in versions:
        (site / "torch").mkdir()
        lines = [
            "from typing import Optional",
            f"__version__ = {versions['torch']!r}",
            f"cuda: Optional[str] = {cuda!r}",
        ]
        (site / "torch" / "version.py").write_text("\n".join(lines) + "\n")
    if variant is not None:
        (site / "fbgemm_gpu" / "docs").mkdir(parents=True)
        (site / "fbgemm_gpu" / "docs" / "target.default.json.py").write_text(json.dumps({"variant": variant}))
    return doctor.inspect_installation([str(site)])


def fits(_: str) -> str:
    return ""


GOOD_CPU = {"torch": "2.13.0+cpu", "fbgemm_gpu-cpu": "1.8.0", "torchrec": "1.8.0", **NEEDS}
GOOD_GPU = {"torch": "2.13.0", "fbgemm_gpu": "1.8.0", "torchrec": "1.8.0", **NEEDS}
OF_2_11 = {"torch": "2.11.0+cpu", "fbgemm_gpu-cpu": "1.6.0", "torchrec": "1.6.1", **NEEDS}

FITTING = {
    "cpu": (CPU, GOOD_CPU, None, "cpu"),
    "gpu": (GPU, GOOD_GPU, "13.0", "cuda"),
    "older trio": (CPU, OF_2_11, None, "cpu"),
    "patch releases": (CPU, {**OF_2_11, "torch": "2.11.1+cpu", "torchrec": "1.6.0"}, None, "cpu"),
    "a CUDA torch runs on the CPU": (CPU, {**GOOD_CPU, "torch": "2.13.0"}, "13.0", "cpu"),
    "an old driver does no harm to the CPU variant": (OLD_GPU, {**GOOD_CPU, "torch": "2.13.0"}, "13.0", "cpu"),
    "a driver too old for any GPU build": (OLD_GPU, GOOD_CPU, None, "cpu"),
    "a driver of the same major version": (doctor.Machine(driver_cuda=(13, 0)), GOOD_GPU, "13.2", "cuda"),
}


@pytest.mark.parametrize("case", FITTING)
def test_what_fits_is_left_alone(case: str, tmp_path: Path) -> None:
    machine, versions, cuda, variant = FITTING[case]
    found = doctor.diagnose(machine, fabricate(tmp_path, versions, cuda, variant), probe=fits)
    assert found.fits, doctor.describe(found)
    assert found.cure.commands() == []


def without(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


ALONE = ["install", "--no-deps"]
MISFITS = {
    "both missing": (
        (CPU, without(GOOD_CPU, "fbgemm_gpu-cpu", "torchrec"), None, None),
        {"fbgemm": "missing", "torchrec": "missing"},
        [[*ALONE, "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0"]],
    ),
    "the CUDA wheel that torchrec's metadata asks for, on a CPU machine": (
        (CPU, {**without(GOOD_CPU, "fbgemm_gpu-cpu"), "fbgemm_gpu": "1.8.0"}, None, "cuda"),
        {"fbgemm": "expected fbgemm-gpu-cpu"},
        [["uninstall", "-y", "fbgemm-gpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
    ),
    "both wheels over one another": (
        (CPU, {**GOOD_CPU, "fbgemm_gpu": "1.9.0"}, None, "cuda"),
        {"fbgemm": "overwrite one another"},
        [["uninstall", "-y", "fbgemm-gpu", "fbgemm-gpu-cpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
    ),
    "a module that another wheel left": (
        (CPU, GOOD_CPU, None, "cuda"),
        {"fbgemm": "its module is the cuda variant"},
        [["uninstall", "-y", "fbgemm-gpu-cpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
    ),
    "fbgemm too new": (
        (CPU, {**GOOD_CPU, "fbgemm_gpu-cpu": "1.9.0"}, None, "cpu"),
        {"fbgemm": "expected 1.8.0 with this torch"},
        [["uninstall", "-y", "fbgemm-gpu-cpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
    ),
    "torchrec too old": (
        (CPU, {**GOOD_CPU, "torchrec": "1.6.1"}, None, "cpu"),
        {"torchrec": "expected 1.8.0 with this torch"},
        [[*ALONE, "torchrec==1.8.0"]],
    ),
    "companions of another torch: the torch that is there stays": (
        (CPU, {**GOOD_CPU, "torch": "2.12.1+cpu"}, None, "cpu"),
        {"fbgemm": "expected 1.7.0", "torchrec": "expected 1.7.0"},
        [["uninstall", "-y", "fbgemm-gpu-cpu"], [*ALONE, "fbgemm-gpu-cpu==1.7.0", "torchrec==1.7.0"]],
    ),
    "a torch that nothing fits": (
        (CPU, {**GOOD_CPU, "torch": "2.15.0+cpu"}, None, "cpu"),
        {"torch": "expected 2.13, 2.12, 2.11"},
        [["install", "torch==2.13.0"]],
    ),
    "2.1 is not 2.11": (
        (CPU, {**GOOD_CPU, "torch": "2.1.1+cpu"}, None, "cpu"),
        {"torch": "expected 2.13, 2.12, 2.11"},
        [["install", "torch==2.13.0"]],
    ),
    "nothing installed": (
        (CPU, {}, None, None),
        {"torch": "missing", "fbgemm": "missing", "torchrec": "missing", "torchrec's needs": "missing: tensordict"},
        [
            ["install", "torch==2.13.0", *(f"{name}=={version}" for name, version in NEEDS.items())],
            [*ALONE, "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0"],
        ],
    ),
    "CPU builds on a machine with a GPU": (
        (GPU, GOOD_CPU, None, "cpu"),
        {"torch": "a CPU build on a machine with a GPU", "fbgemm": "expected fbgemm-gpu on"},
        [
            ["uninstall", "-y", "torch", "fbgemm-gpu-cpu"],
            ["install", "torch==2.13.0"],
            [*ALONE, "fbgemm-gpu==1.8.0"],
        ],
    ),
    "a driver too old for torch's CUDA": (
        (OLD_GPU, GOOD_GPU, "13.0", "cuda"),
        {"driver": "too old for torch's CUDA 13.0", "fbgemm": "expected fbgemm-gpu-cpu"},
        [["uninstall", "-y", "fbgemm-gpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
    ),
    "one of torchrec's needs missing": (
        (CPU, without(GOOD_CPU, "tensordict"), None, "cpu"),
        {"torchrec's needs": "missing: tensordict"},
        [["install", f"tensordict=={NEEDS['tensordict']}"]],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_every_misfit_is_named_and_cured(case: str, tmp_path: Path) -> None:
    (machine, versions, cuda, variant), expected, commands = MISFITS[case]
    found = doctor.diagnose(machine, fabricate(tmp_path, versions, cuda, variant), probe=fits)
    problems = {part: problem for part, _, problem in found.rows if problem}
    assert problems.keys() == expected.keys()
    assert all(text in problems[part] for part, text in expected.items()), problems
    assert found.cure.commands() == commands
    line = found.cure.line("python")
    assert "\n" not in line
    assert line.count("python -m pip") == len(commands)


@pytest.mark.parametrize(
    ("module", "reason", "commands"),
    [
        ("torch", "ModuleNotFoundError: No module named 'sympy'", [["install", "sympy"]]),
        (
            "fbgemm_gpu",
            "OSError: undefined symbol: _ZN3c10",
            [["uninstall", "-y", "fbgemm-gpu-cpu"], [*ALONE, "fbgemm-gpu-cpu==1.8.0"]],
        ),
        ("torch", "died of signal 11", [["uninstall", "-y", "torch"], ["install", "torch==2.13.0"]]),
    ],
)
def test_a_module_that_does_not_load_is_named_with_its_reason(
    module: str, reason: str, commands: list[list[str]], tmp_path: Path
) -> None:
    tried: list[str] = []

    def probe(name: str) -> str:
        tried.append(name)
        return reason if name == module else ""

    found = doctor.diagnose(CPU, fabricate(tmp_path, GOOD_CPU, None, "cpu"), probe=probe)
    assert not found.fits
    assert ("loading", module, reason) in found.rows
    assert tried[-1] == module, "what imports a broken module says nothing new"
    assert found.cure.commands() == commands


def test_a_broken_torch_is_replaced_by_the_same_release(tmp_path: Path) -> None:
    installed = fabricate(tmp_path, OF_2_11, None, "cpu")
    found = doctor.diagnose(CPU, installed, probe=lambda name: "died of signal 11")
    assert found.cure.commands() == [["uninstall", "-y", "torch"], ["install", "torch==2.11.0"]]


def test_nothing_is_loaded_while_versions_do_not_fit(tmp_path: Path) -> None:
    installed = fabricate(tmp_path, {**GOOD_CPU, "torchrec": "1.6.1"}, None, "cpu")

    def probe(name: str) -> str:
        raise AssertionError(f"loaded {name}")

    assert not doctor.diagnose(CPU, installed, probe=probe).fits


def test_probe_gives_the_last_line_of_the_reason() -> None:
    assert doctor.probe_module("json") == ""
    assert doctor.probe_module("no_such_module_here") == "ModuleNotFoundError: No module named 'no_such_module_here'"
    assert "signal 9" in doctor.probe_module("os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("| NVIDIA-SMI 570.86  Driver Version: 570.86  CUDA Version: 12.8 |", (12, 8)),
        ("| NVIDIA-SMI 590.44  KMD Version: 590.44  CUDA UMD Version: 13.1 |", (13, 1)),
    ],
)
def test_driver_version_comes_from_nvidia_smi(
    answer: str, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{answer}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.inspect_machine() == doctor.Machine(driver_cuda=expected)


def test_device_overrules_the_machine(tmp_path: Path) -> None:
    installed = fabricate(tmp_path, GOOD_CPU, None, "cpu")
    assert doctor.diagnose(GPU, installed, device="cpu", probe=fits).fits
    cure = doctor.diagnose(CPU, installed, device="cuda", probe=fits).cure
    assert [*ALONE, "fbgemm-gpu==1.8.0"] in cure.commands()


def test_main_prints_one_line_of_cure_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fabricate(tmp_path, {**GOOD_CPU, "torchrec": "1.6.1"}, None, "cpu")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if "pip" in line] == [
        f"cure: {sys.executable} -m pip install --no-deps torchrec==1.8.0"
    ]
