"""One checkpoint on disk: what its files hold, how they are written so that they last, and how damage is recognised.

- `<group>.safetensors`: the tensors below one top-level key of the state, under their names in it.
- `state.json`: the rest of the state, and which file holds which group.
- `manifest.json`: size and XXH3 checksum of every other file, and the checksum of the manifest itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cattrs
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlrm.data.dataset import checksum
from dlrm.training.atomic_folder import sync
from dlrm.training.state_tree import FlatState, unflatten

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
CHUNK = 32_768  # torch works on so few elements in the calling thread; on more, also on the trainer's cores


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written: half of it, or other bytes."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and checksum of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`; `xxh3_128` is the checksum of its text with this field left empty."""

    samples: int
    metric: float | None
    is_best: bool
    files: dict[str, FileInfo]
    written_with: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    xxh3_128: str = ""


def write_checkpoint(folder: Path, state: FlatState, *, samples: int, metric: float | None, is_best: bool) -> None:
    """Write a checkpoint's files into an empty folder, down to the disk.

    Raises:
        OSError, safetensors.SafetensorError: a write failed, for instance because the disk is full.
    """
    names = _name_files(state.tensors)
    for group, tensors in state.tensors.items():
        save_file(tensors, folder / names[group])
    content = {"files": names, "state": state.skeleton}
    (folder / STATE).write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    mode = (folder / STATE).stat().st_mode
    files = {}
    for name in (*names.values(), STATE):
        (folder / name).chmod(mode)  # safetensors makes files that nobody else may read
        sync(folder / name)
        files[name] = FileInfo(bytes=(folder / name).stat().st_size, xxh3_128=checksum(folder / name))
    manifest = Manifest(
        samples=samples,
        metric=metric if metric is not None and math.isfinite(metric) else None,
        is_best=is_best,
        files=files,
        written_with={"recforge": _own_version(), "torch": torch.__version__},
    )
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    (folder / MANIFEST).write_text(_insert_checksum(text, "", _checksum_text(text)), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint says of itself; its other files are not looked at.

    Raises:
        DamagedCheckpointError: the manifest is absent, cannot be read, or is not what was written.
        ValueError: a newer version of recforge wrote it.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode("utf-8")
        raw = json.loads(text)
        found = raw["xxh3_128"]
        intact = _checksum_text(_insert_checksum(text, found, "")) == found
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder}: {MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not intact:
        raise DamagedCheckpointError(f"{folder}: {MANIFEST} is damaged (checksum)")
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder}: expected checkpoint format {FORMAT_VERSION}, got {raw['format_version']} (written with "
            f"{raw['written_with']}); use that version of recforge"
        )
    return cattrs.structure(raw, Manifest)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint and compare sizes and checksums.

    Raises:
        DamagedCheckpointError: naming the first file that is not what was written.
    """
    for name, info in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != info.bytes:
                raise DamagedCheckpointError(f"{folder}: {name} is damaged (expected {info.bytes} bytes, got {size})")
            intact = checksum(path) == info.xxh3_128
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{folder}: {name} is missing") from error
        except OSError as error:
            raise DamagedCheckpointError(f"{folder}: {name} cannot be read ({error.strerror})") from error
        if not intact:
            raise DamagedCheckpointError(f"{folder}: {name} is damaged (checksum)")


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a checkpoint whose files are intact; its tensors lie in memory of their own, on the CPU."""
    content = json.loads((folder / STATE).read_text(encoding="utf-8"))
    with ExitStack() as stack:
        # Read rather than mapped: mapped pages count as the process's memory, beside the tensors made of them.
        files = {
            group: stack.enter_context(safe_open(folder / name, framework="pt", backend="pread"))
            for group, name in content["files"].items()
        }
        # Cloned, as torch aligns its memory to 64 bytes, which can decide in which order a kernel sums.
        state: dict[str, Any] = unflatten(content["state"], lambda group, name: files[group].get_tensor(name).clone())
    return state


def check_finite(state: FlatState) -> None:
    """Look for NaN and infinities in every tensor, in the calling thread alone.

    Raises:
        ValueError: naming the first such tensor, and the row in it.
    """
    for group, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            at = _first_nonfinite(tensor)
            if at is None:
                continue
            value = tensor.reshape(-1)[at].item()
            row = f" in row {at // math.prod(tensor.shape[1:])}" if tensor.ndim else ""
            raise ValueError(f"expected finite values in {group}/{name}, got {value}{row}; lower the learning rate")


def _first_nonfinite(tensor: Tensor) -> int | None:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        numbers = torch.view_as_real(chunk) if chunk.is_complex() else chunk
        if numbers.itemsize == 1:  # 8-bit floats know no minimum
            numbers = numbers.float()
        lowest, highest = torch.aminmax(numbers)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            finite = torch.isfinite(chunk.float() if chunk.itemsize == 1 else chunk)
            return start + int((~finite).nonzero()[0])
    return None


def _name_files(groups: Iterable[str]) -> dict[str, str]:
    """Give every group a file whose name any file system takes."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for group in groups:
        stem = wanted = re.sub(r"[^\w-]", "_", group, flags=re.ASCII)[:100] or "_"
        attempt = 1
        while stem.lower() in taken:
            attempt += 1
            stem = f"{wanted}-{attempt}"
        taken.add(stem.lower())
        names[group] = f"{stem}.safetensors"
    return names


def _checksum_text(text: str) -> str:
    return xxhash.xxh3_128(text.encode("utf-8")).hexdigest()


def _insert_checksum(text: str, old: str, new: str) -> str:
    # The last one: every file has a checksum before it.
    head, key, tail = text.rpartition(f'"xxh3_128": "{old}"')
    return f'{head}"xxh3_128": "{new}"{tail}' if key else text


def _own_version() -> str:
    try:
        return version("recforge")
    except PackageNotFoundError:
        return "not installed"
