"""Say whether torch, fbgemm, torchrec and the driver fit together, and print the one line that makes them fit.

pip cannot know this: torchrec's metadata asks for `fbgemm-gpu`, the CUDA wheel, on every machine, and that wheel writes
over the module of `fbgemm-gpu-cpu`. So neither is a dependency of recforge in its metadata; this file puts them there.
It needs the standard library only, and runs before anything is installed: `python deploy/doctor.py --fix`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

TORCH, TORCH_CUDA = "2.13.0", "13.0"  # the release that is pinned, and what its CUDA build is built for
# torch release -> (fbgemm, torchrec): fbgemm's compiled code is built against one torch release.
COMPANIONS = {"2.13": ("1.8.0", "1.8.0"), "2.12": ("1.7.0", "1.7.0"), "2.11": ("1.6.0", "1.6.1")}
# What torchrec and fbgemm import and recforge does not; both are installed with --no-deps.
LIGHT_NEEDS = {"tensordict": "0.15.3", "torchmetrics": "1.0.3", "tqdm": "4.70.1", "pyre-extensions": "0.0.32"}
FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
MODULES = ("torch", "fbgemm_gpu", "torchrec")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine has: the highest CUDA version its driver speaks, as (major, minor), or None without a GPU."""

    driver_cuda: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What is installed: version by normalized distribution name, and what the files themselves say they are."""

    versions: dict[str, str]
    torch_cuda: str | None = None
    fbgemm_variant: str | None = None

    @property
    def fbgemm_wheels(self) -> list[str]:
        """Every installed distribution that writes into the module `fbgemm_gpu`."""
        return sorted(name for name in self.versions if re.fullmatch(r"fbgemm-gpu(-nightly|-genai)?(-cpu)?", name))


@dataclass
class Cure:
    """The one line: distributions to take away, then to install with their needs, then without them."""

    remove: list[str] = field(default_factory=list)
    install: list[str] = field(default_factory=list)
    install_alone: list[str] = field(default_factory=list)

    def commands(self) -> list[list[str]]:
        """The pip calls, in order; none where nothing is to be done."""
        steps = [
            (["uninstall", "-y"], self.remove),
            (["install"], self.install),
            (["install", "--no-deps"], self.install_alone),
        ]
        return [[*verb, *names] for verb, names in steps if names]

    def line(self, python: str) -> str:
        """The calls as one line for a shell."""
        return " && ".join(" ".join([python, "-m", "pip", *command]) for command in self.commands())


@dataclass
class Diagnosis:
    """Rows of (part, what was found, what does not fit or ""), and the cure; notes are for what works all the same."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cure: Cure = field(default_factory=Cure)

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not any(problem for _, _, problem in self.rows)


def inspect_machine() -> Machine:
    """Ask `nvidia-smi`, or in a container without it the driver's library, which CUDA version the driver speaks."""
    if shutil.which("nvidia-smi"):
        report = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        version = re.search(r"CUDA (?:\w+ )?Version:\s*(\d+)\.(\d+)", report.stdout)
        if report.returncode == 0 and version:
            return Machine(driver_cuda=(int(version[1]), int(version[2])))
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Machine(driver_cuda=None)
    number, devices = ctypes.c_int(), ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(devices))
    if failed or devices.value == 0 or driver.cuDriverGetVersion(ctypes.byref(number)):
        return Machine(driver_cuda=None)
    return Machine(driver_cuda=(number.value // 1000, number.value % 1000 // 10))


def inspect_installation(paths: Sequence[str]) -> Installation:
    """Read versions and variants from the files under `paths`, importing nothing."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions(path=list(paths)):
        name = distribution.metadata["Name"]
        if name:  # an interrupted uninstall leaves folders without metadata behind
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    torch_version = _read(paths, "torch/version.py")
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", torch_version, re.MULTILINE)
    target = _read(paths, "fbgemm_gpu/docs/target.default.json.py")
    try:
        variant = json.loads(target).get("variant") if target else None
    except ValueError:
        variant = None
    return Installation(versions=versions, torch_cuda=cuda[1] if cuda else None, fbgemm_variant=variant)


def _read(paths: Sequence[str], name: str) -> str:
    files = (Path(path) / name for path in paths)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


def probe_module(name: str) -> str:
    """Import a module in a process of its own; return "" or the reason why it does not load."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode < 0:
        return f"the process that imported it died of signal {-done.returncode}"
    return lines[-1][:160] if lines else f"exit status {done.returncode}"


def diagnose(
    machine: Machine, installed: Installation, *, device: str = "auto", probe: Callable[[str], str] = probe_module
) -> Diagnosis:
    """Compare what is installed with what fits this machine; modules are loaded only where all versions fit.

    Args:
        machine: what the machine has.
        installed: what is installed.
        device: "cpu" or "cuda" to overrule what the machine has, or "auto".
        probe: imports a module; returns "" or the reason why it does not load.
    """
    found = Diagnosis()
    variant = _check_driver(found, machine, installed, device)
    release = _check_torch(found, installed, variant)
    fbgemm, torchrec = COMPANIONS[release]
    _check_fbgemm(found, installed, variant, fbgemm)
    _check_torchrec(found, installed, torchrec)
    loads_here = variant == "cpu" or machine.driver_cuda is not None
    if found.fits and loads_here:
        torch = installed.versions["torch"].partition("+")[0]
        _check_loading(found, probe, (f"torch=={torch}", f"{FBGEMM[variant]}=={fbgemm}", f"torchrec=={torchrec}"))
    return found


def _check_driver(found: Diagnosis, machine: Machine, installed: Installation, device: str) -> str:
    """Return the variant, "cpu" or "cuda", that everything else has to be."""
    speaks = machine.driver_cuda
    if speaks is None:
        found.rows.append(("driver", "no NVIDIA GPU", ""))
        return "cuda" if device == "cuda" else "cpu"
    variant = "cpu" if device == "cpu" else "cuda"
    too_old = ""
    needs = installed.torch_cuda or TORCH_CUDA
    # Drivers speak every CUDA release of their major version, so the minor one does not matter.
    if speaks[0] < int(needs.split(".")[0]):
        too_old = f"too old for torch's CUDA {needs}"
        variant = "cpu"
        found.notes.append(f"the driver is {too_old}: update it to use the GPU; until then the CPU variant runs")
    # Once the CPU variant stands, an old driver harms nothing, and no pip line could make it newer.
    harms = too_old and installed.fbgemm_wheels != [FBGEMM["cpu"]]
    found.rows.append(("driver", f"CUDA {speaks[0]}.{speaks[1]}", too_old if harms else ""))
    return variant


def _check_torch(found: Diagnosis, installed: Installation, variant: str) -> str:
    """Return the torch release ("2.13") that there is, or will be once the cure is done."""
    version = installed.versions.get("torch")
    release = ".".join((version or "").split(".")[:2])
    shown = f"{version} (CUDA {installed.torch_cuda})" if installed.torch_cuda else version or "missing"
    problem = ""
    if version is None:
        problem = "missing"
    elif release not in COMPANIONS:
        problem = f"expected {', '.join(COMPANIONS)}"
    elif variant == "cuda" and installed.torch_cuda is None:
        problem = "a CPU build on a machine with a GPU"
        # pip takes 2.13.0+cpu for 2.13.0 and would leave it there.
        found.cure.remove.append("torch")
    elif variant == "cpu" and installed.torch_cuda is not None:
        found.notes.append("torch is a CUDA build: it runs here, but a CPU build is some gigabytes smaller")
    found.rows.append(("torch", shown, problem))
    if problem:
        found.cure.install.append(f"torch=={TORCH}")
        return ".".join(TORCH.split(".")[:2])
    return release


def _check_fbgemm(found: Diagnosis, installed: Installation, variant: str, version: str) -> None:
    wheels, wanted = installed.fbgemm_wheels, FBGEMM[variant]
    shown = ", ".join(f"{name} {installed.versions[name]}" for name in wheels) or "missing"
    problem = ""
    if not wheels:
        problem = "missing"
    elif len(wheels) > 1:
        problem = "wheels that overwrite one another's module"
    elif wheels != [wanted]:
        problem = f"expected {wanted} on a machine {'with' if variant == 'cuda' else 'without'} a usable GPU"
    elif not installed.versions[wanted].startswith(version.rpartition(".")[0] + "."):
        problem = f"expected {version} with this torch"
    elif installed.fbgemm_variant not in (None, variant):
        problem = f"its module is the {installed.fbgemm_variant} variant, left by another wheel"
    found.rows.append(("fbgemm", shown, problem))
    if problem:
        found.cure.remove += wheels
        found.cure.install_alone.append(f"{wanted}=={version}")


def _check_torchrec(found: Diagnosis, installed: Installation, version: str) -> None:
    present = installed.versions.get("torchrec")
    problem = ""
    if present is None:
        problem = "missing"
    elif not present.startswith(version.rpartition(".")[0] + "."):
        problem = f"expected {version} with this torch"
    found.rows.append(("torchrec", present or "missing", problem))
    if problem:
        found.cure.install_alone.append(f"torchrec=={version}")
    missing = [name for name in LIGHT_NEEDS if name not in installed.versions]
    if missing:
        found.rows.append(("torchrec's needs", "", f"missing: {', '.join(missing)}"))
        found.cure.install += [f"{name}=={LIGHT_NEEDS[name]}" for name in missing]


def _check_loading(found: Diagnosis, probe: Callable[[str], str], pins: tuple[str, ...]) -> None:
    """Load the modules one after the other; the first that fails is the one to mend, since the later import it."""
    for module, pin in zip(MODULES, pins, strict=True):
        reason = probe(module)
        if not reason:
            continue
        found.rows.append(("loading", module, reason))
        absent = re.search(r"No module named '(\w+)", reason)
        if absent and absent[1] not in MODULES:
            found.cure.install.append(absent[1])
        else:
            found.cure.remove.append(pin.partition("==")[0])
            (found.cure.install if module == "torch" else found.cure.install_alone).append(pin)
        return
    found.rows.append(("loading", ", ".join(MODULES), ""))


def describe(found: Diagnosis) -> str:
    """The table, then the notes."""
    wide = [max(len(row[column]) for row in found.rows) for column in range(2)]
    lines = [f"{part:<{wide[0]}}  {what:<{wide[1]}}  {problem or 'fits'}" for part, what, problem in found.rows]
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what fits and what does not; exit status 0 where everything does, else 1."""
    parser = argparse.ArgumentParser(prog="recforge doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="run the line that is printed, then look again")
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="auto", help="default: what the machine has")
    arguments = parser.parse_args(argv)
    machine = inspect_machine()
    found = _examine(machine, arguments.device)
    if arguments.fix and found.cure.commands():
        print(f"running: {found.cure.line(sys.executable)}", flush=True)
        if not _run(found.cure):
            print("the line failed; what pip said stands above", file=sys.stderr)
            return 1
        found = _examine(machine, arguments.device)
    if found.fits:
        print("everything fits")
        return 0
    print(f"cure: {found.cure.line(sys.executable)}")
    return 1


def _examine(machine: Machine, device: str) -> Diagnosis:
    found = diagnose(machine, inspect_installation(sys.path), device=device)
    print(describe(found))
    return found


def _run(cure: Cure) -> bool:
    pip = [sys.executable, "-m", "pip", "-qq"]  # -qq leaves pip's errors and drops its warnings
    return all(subprocess.run([*pip, *command], check=False).returncode == 0 for command in cure.commands())


if __name__ == "__main__":
    sys.exit(main())
