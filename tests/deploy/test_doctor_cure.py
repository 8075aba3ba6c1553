"""The doctor's line, run for real by pip, on made-up wheels in a throw-away environment: afterwards everything fits."""

from __future__ import annotations

import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pip
import pytest

from deploy import doctor

SCRIPT = Path(doctor.__file__)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: str = "") -> Path:
    """Write the smallest wheel that pip installs and uninstalls."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        requires and f"Requires-Dist: {requires}\n"
    )
    files = {
        **files,
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
        wheel.writestr(record, "".join(f"{file},,\n" for file in [*files, record]))
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of its own: CPU and CUDA torch, both fbgemm wheels, torchrec with the metadata that sets the trap."""
    folder = tmp_path_factory.mktemp("wheels")
    for version, cuda in (("2.13.0+cpu", None), ("2.13.0", "13.0"), ("2.15.0", "13.2")):
        home = folder / ("cuda" if cuda else "cpu")
        home.mkdir(exist_ok=True)
        make_wheel(home, "torch", version, {"torch/__init__.py": "", "torch/version.py": f"cuda = {cuda!r}\n"})
    for name, variant in (("fbgemm-gpu-cpu", "cpu"), ("fbgemm-gpu", "cuda")):
        for version in ("1.8.0", "1.9.0"):
            loads = "" if version == "1.8.0" else "raise OSError('undefined symbol')\n"
            target = {"fbgemm_gpu/docs/target.default.json.py": f'{{"variant": "{variant}"}}'}
            make_wheel(folder, name, version, {"fbgemm_gpu/__init__.py": loads, **target})
    make_wheel(folder, "torchrec", "1.8.0", {"torchrec/__init__.py": "import fbgemm_gpu\n"}, requires="fbgemm-gpu")
    for name, version in doctor.LIGHT_NEEDS.items():
        make_wheel(folder, name, version, {f"{name.replace('-', '_')}.py": ""})
    return folder


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An empty environment; it borrows this one's pip, which takes no time."""
    venv.create(tmp_path / "env", symlinks=True)
    site = next((tmp_path / "env" / "lib").glob("python3*/site-packages"))
    for path in Path(pip.__file__).parent.parent.glob("pip*"):
        (site / path.name).symlink_to(path)
    return tmp_path / "env" / "bin" / "python"


def put(python: Path, *wheels: Path) -> None:
    """Unpack wheels over one another, as careless installs do."""
    site = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def run_doctor(python: Path, links: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": " ".join(map(str, links)),
        "PYTHONPATH": "",
    }
    command = [str(python), str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


CPU_CASES = {
    "nothing installed": (),
    "both fbgemm wheels, the CUDA one on top": (
        "cpu/torch-2.13.0+cpu",
        "fbgemm_gpu_cpu-1.8.0",
        "fbgemm_gpu-1.8.0",
        "torchrec-1.8.0",
    ),
    "torch and fbgemm too new": ("cuda/torch-2.15.0", "fbgemm_gpu_cpu-1.9.0"),
}


@pytest.mark.parametrize("case", CPU_CASES)
def test_the_line_cures_a_cpu_machine(case: str, wheels: Path, python: Path) -> None:
    put(python, *(wheels / f"{stem}-py3-none-any.whl" for stem in CPU_CASES[case]))
    links = [wheels, wheels / "cpu"]
    before = run_doctor(python, links, "--device", "cpu")
    assert before.returncode == 1, before.stdout
    assert before.stdout.count("cure: ") == 1
    line = before.stdout.partition("cure: ")[2]
    fixed = run_doctor(python, links, "--device", "cpu", "--fix")
    assert f"running: {line}" in fixed.stdout
    assert (fixed.returncode, fixed.stdout.splitlines()[-1]) == (0, "everything fits"), fixed.stdout + fixed.stderr


def test_the_line_cures_a_gpu_machine_with_cpu_builds(wheels: Path, python: Path) -> None:
    stems = ("cpu/torch-2.13.0+cpu", "fbgemm_gpu_cpu-1.8.0", "torchrec-1.8.0")
    put(python, *(wheels / f"{stem}-py3-none-any.whl" for stem in stems))
    fixed = run_doctor(python, [wheels, wheels / "cuda"], "--device", "cuda", "--fix")
    assert (fixed.returncode, fixed.stdout.splitlines()[-1]) == (0, "everything fits"), fixed.stdout + fixed.stderr
    site = next((python.parent.parent / "lib").glob("python3*/site-packages"))
    installed = doctor.inspect_installation([str(site)])
    assert (installed.torch_cuda, installed.fbgemm_variant) == ("13.0", "cuda")
    assert installed.fbgemm_wheels == ["fbgemm-gpu"]


def test_a_line_that_fails_is_said_without_a_traceback(wheels: Path, python: Path) -> None:
    failed = run_doctor(python, [wheels / "cuda"], "--device", "cpu", "--fix")
    assert failed.returncode == 1
    assert "the line failed" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "No matching distribution" in failed.stderr
