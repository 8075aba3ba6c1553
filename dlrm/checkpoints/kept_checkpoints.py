"""The checkpoints of one folder: how they are named, what they say of themselves, and which of them stay."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dlrm.checkpoints.atomic_folder import remove_folder
from dlrm.checkpoints.manifest import DamagedCheckpointError, Manifest, read_manifest

NAME = re.compile(r"samples-(\d{12,})(?:\.(\d+))?")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    folder: Path
    samples: int
    metric: float | None
    is_best: bool
    bytes: int


def find_checkpoints(folder: Path) -> tuple[Path, ...]:
    """Return the checkpoints' folders, newest first."""
    if not folder.is_dir():
        return ()
    return tuple(sorted((path for path in folder.iterdir() if NAME.fullmatch(path.name)), key=age_of, reverse=True))


def list_checkpoints(folder: Path) -> tuple[CheckpointInfo, ...]:
    """Return what there is, newest first, going by manifests alone; one without a readable manifest is left out."""
    infos = []
    for checkpoint in find_checkpoints(folder):
        with suppress(DamagedCheckpointError):
            infos.append(describe_checkpoint(checkpoint, read_manifest(checkpoint)))
    return tuple(infos)


def describe_checkpoint(folder: Path, manifest: Manifest) -> CheckpointInfo:
    """Return what a manifest says."""
    return CheckpointInfo(
        folder=folder,
        samples=manifest.samples,
        metric=manifest.metric,
        is_best=manifest.is_best,
        bytes=sum(info.bytes for info in manifest.files.values()),
    )


def was_saved(folder: Path, save: str, samples: int) -> bool:
    """Whether the checkpoint of a save, after so many samples, is there."""
    for checkpoint in find_checkpoints(folder):
        if age_of(checkpoint)[0] == samples:
            with suppress(DamagedCheckpointError):
                if read_manifest(checkpoint).save == save:
                    return True
    return False


def free_name(folder: Path, samples: int) -> Path:
    """Return a name that is newer than any of as many samples, so that no name ever changes its content."""
    revisions = [revision for other, revision in map(age_of, find_checkpoints(folder)) if other == samples]
    return folder / (f"samples-{samples:012d}" + (f".{max(revisions) + 1}" if revisions else ""))


def remove_old(folder: Path, keep_last: int, damaged: Collection[Path]) -> None:
    """Remove all but the last ones and the best; of those that cannot be read, what is newer stays too."""
    readable = [info for info in list_checkpoints(folder) if info.folder not in damaged]
    newest = {info.samples: info.folder for info in reversed(readable)}
    last = sorted(newest.values(), key=age_of)[-keep_last:]
    best = next((info.folder for info in readable if info.is_best), None)
    unreadable = set(find_checkpoints(folder)) - {info.folder for info in readable}
    spared = {checkpoint for checkpoint in unreadable if age_of(checkpoint) > age_of(last[0])}
    for checkpoint in find_checkpoints(folder):
        if checkpoint not in spared and checkpoint not in last and checkpoint != best:
            remove_folder(checkpoint)


def say_what_remains(folder: Path) -> str:
    """Say, for an error, which checkpoints there are."""
    samples = ", ".join(f"{age_of(checkpoint)[0]:,}" for checkpoint in find_checkpoints(folder))
    return f"kept: the checkpoints after {samples} samples" if samples else "there is no earlier checkpoint"


def age_of(folder: Path) -> tuple[int, int]:
    """Return by what checkpoints are ordered: samples, and the revision where there are several of as many."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)
