"""What a checkpoint says of itself, `manifest.json`: by its checksums, damage to any byte is recognised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cattrs
import torch
import xxhash

from dlrm.checkpoints.atomic_folder import sync
from dlrm.data.dataset import checksum

FORMAT_VERSION = 2
READABLE = (1, 2)  # 1 is what one process wrote before there were ranks; version 2 reads as it does where there is one
MANIFEST = "manifest.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written: half of it, or other bytes."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and checksum of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`; `xxh3_128` is the checksum of its text with this field left empty.

    Attributes:
        samples: how far the run had come.
        metric: of the evaluation before.
        is_best: it was the best state so far.
        files: all other files of the folder.
        written_with: versions.
        ranks: how many wrote it.
        save: by which a rank knows the checkpoint that it had a part in.
        format_version: raised when an older reader would misread the files.
        xxh3_128: see above.
    """

    samples: int
    metric: float | None
    is_best: bool
    files: dict[str, FileInfo]
    written_with: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    save: str = ""
    format_version: int = FORMAT_VERSION
    xxh3_128: str = ""


def describe_file(path: Path) -> FileInfo:
    """Take a file's size and checksum."""
    return FileInfo(bytes=path.stat().st_size, xxh3_128=checksum(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` down to the disk, and the entries of the folder."""
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
    if raw["format_version"] not in READABLE:
        raise ValueError(
            f"{folder}: expected checkpoint format {' or '.join(map(str, READABLE))}, got {raw['format_version']} "
            f"(written with {raw['written_with']}); use that version of recforge"
        )
    return cattrs.structure(raw, Manifest)


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Read files of a checkpoint, by default all, and compare sizes and checksums.

    Raises:
        DamagedCheckpointError: naming the first file that is not what was written.
    """
    for name in manifest.files if names is None else names:
        path, info = folder / name, manifest.files[name]
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


def own_versions() -> dict[str, str]:
    """Return the versions that a reader may want to know."""
    try:
        own = version("recforge")
    except PackageNotFoundError:
        own = "not installed"
    return {"recforge": own, "torch": torch.__version__}


def _checksum_text(text: str) -> str:
    return xxhash.xxh3_128(text.encode("utf-8")).hexdigest()


def _insert_checksum(text: str, old: str, new: str) -> str:
    # The last one: every file has a checksum before it.
    head, key, tail = text.rpartition(f'"xxh3_128": "{old}"')
    return f'{head}"xxh3_128": "{new}"{tail}' if key else text
