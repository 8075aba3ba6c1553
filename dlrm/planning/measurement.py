"""A measurement of a machine as it is kept: what was found, on which machine, when and with which version."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cattrs

from dlrm.this_machine import count_cores
from embeddings.planning.machine import Machine

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Place:
    """What must be the same for a measurement to hold.

    Attributes:
        cpu: the processor's name.
        cores: that a process may use.
        recforge: the version.
    """

    cpu: str
    cores: int
    recforge: str

    def __str__(self) -> str:
        """Name the place in a line."""
        return f"{self.cores} core{'' if self.cores == 1 else 's'} of {self.cpu}, recforge {self.recforge}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was found.

    Attributes:
        place: where.
        measured_at: when, as ISO 8601.
        machine: what it can do.
    """

    place: Place
    measured_at: str
    machine: Machine


def default_path() -> Path:
    """Return where a measurement of this machine is kept."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "recforge" / "machine.json"


def this_place() -> Place:
    """Return the place where this process runs."""
    try:
        recforge = version("recforge")
    except PackageNotFoundError:
        recforge = "unknown"
    return Place(cpu=_name_cpu(), cores=count_cores(), recforge=recforge)


def measured_now(machine: Machine) -> Measurement:
    """Return a measurement of here and now."""
    now = datetime.now(timezone.utc).replace(microsecond=0)
    return Measurement(place=this_place(), measured_at=now.isoformat(), machine=machine)


def load_measurement(path: Path) -> Measurement | None:
    """Read a measurement; None if there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format", None) != FORMAT:
            raise ValueError("another format")
        found = cattrs.structure(content, Measurement)
        _check_numbers(asdict(found.machine))
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, cattrs.BaseValidationError) as error:
        raise ValueError(
            f"--calibration: expected a measurement in {path}, got something else ({_shorten(error)}); "
            "--calibrate writes it anew"
        ) from error


def save_measurement(measurement: Measurement, path: Path) -> None:
    """Keep a measurement: whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"format": FORMAT, **asdict(measurement)}, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise ValueError(
            f"--calibration: expected a file that can be written, got {path} ({error.strerror})"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _check_numbers(content: Any, name: str = "machine") -> None:
    """Check that all numbers are finite and not below 0, and bandwidths above."""
    if isinstance(content, dict):
        for key, value in content.items():
            _check_numbers(value, key)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_numbers(value, name)
    elif isinstance(content, int | float):
        least_open = name in ("bytes_per_second", "copy_bytes_per_second", "flops", "cores_per_node", "slowdowns")
        if not math.isfinite(content) or content < 0 or (least_open and content == 0):
            raise ValueError(f"{name} {content}")


def _shorten(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "no JSON"
    if isinstance(error, OSError):
        return str(error.strerror)
    return str(error) if type(error) is ValueError else "other fields"


def _name_cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
