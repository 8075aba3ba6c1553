"""Keeps the checkpoints of a run: written in the background, there whole or not at all, and checked when read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dlrm.training.atomic_folder import make_folder, remove_folder, remove_leftovers
from dlrm.training.checkpoint_folder import (
    DamagedCheckpointError,
    Manifest,
    check_finite,
    read_manifest,
    read_state,
    verify_files,
    write_checkpoint,
)
from dlrm.training.state_tree import FlatState, flatten

NAME = re.compile(r"samples-(\d{12,})(?:\.(\d+))?")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    folder: Path
    samples: int
    metric: float | None
    is_best: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A state that was read back, and one line for each damaged checkpoint that was passed over."""

    state: dict[str, Any]
    info: CheckpointInfo
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, a folder each: `samples-000000065536` and so on.

    `save` copies the state and returns; a thread writes the copy. The copy's memory is kept for the next save, so that
    a run that saves needs room for its state twice. One process at a time may save into a folder; any may read.

    Args:
        folder: made at the first save.
        keep_last: checkpoints that are kept; the best one is kept besides.
        finite: refuse to write a state whose tensors hold NaN or infinities.

    Raises:
        ValueError: `keep_last` is below 1.
    """

    def __init__(self, folder: Path | str, *, keep_last: int = 3, finite: bool = True) -> None:
        if keep_last < 1:
            raise ValueError(f"--checkpoint.keep-last: expected at least 1, got {keep_last}")
        self.folder, self.keep_last, self.finite = Path(folder), keep_last, finite
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._damaged: set[Path] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        remove_leftovers(self.folder)

    def save(
        self, state: Mapping[str, object], *, samples: int, metric: float | None = None, is_best: bool = False
    ) -> None:
        """Copy a state now, and write it in the background; waits first until the save before it is on disk.

        Args:
            state: nested dict, list and tuple of tensors, str, int, float, bool and None; each top-level key with
                tensors below it gets a file. What comes back is equal, its tensors contiguous and on the CPU.
            samples: how far the run has come; replaces a checkpoint of as many samples.
            metric: what `list` shows; NaN counts as None.
            is_best: this is the best state so far.

        Raises:
            ValueError: the state holds something else than the above, or the save before this one failed.
        """
        self.wait()
        flat = flatten(state)
        flat.tensors = self._copy(flat.tensors)
        self._pending = self._thread.submit(self._write, flat, samples, metric, is_best)

    def wait(self) -> None:
        """Wait until everything that was asked for is on disk.

        Raises:
            ValueError: the last save failed, as the disk is full or the state not finite; earlier ones are still there.
        """
        if self._pending is not None:
            wait((self._pending,))  # apart from asking for the result, so that Ctrl-C in between forgets nothing
            done, self._pending = self._pending, None
            done.result()

    def restore_latest(self) -> Restored | None:
        """Read the newest checkpoint whose checksums hold; None if there is none at all.

        Raises:
            ValueError: every checkpoint is damaged, or the newest is of another format version.
        """
        return self._restore(best=False)

    def restore_best(self) -> Restored | None:
        """Read the newest intact checkpoint that was saved as the best; None if none was.

        Raises:
            ValueError: as `restore_latest`.
        """
        return self._restore(best=True)

    def list(self) -> tuple[CheckpointInfo, ...]:
        """Return what there is, newest first, going by manifests alone; one without a readable manifest is left out."""
        infos = []
        for folder in self._folders():
            with suppress(DamagedCheckpointError):
                infos.append(_describe(folder, read_manifest(folder)))
        return tuple(infos)

    def _copy(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        before, self._copies = self._copies, {}
        for group, named in tensors.items():
            for name, tensor in named.items():
                copy = before.pop((group, name), None)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._copies[group, name] = copy.copy_(tensor)
        return {group: {name: self._copies[group, name] for name in named} for group, named in tensors.items()}

    def _write(self, state: FlatState, samples: int, metric: float | None, is_best: bool) -> None:
        failure = f"the checkpoint after {samples:,} samples was not written"
        if self.finite:
            try:
                check_finite(state)
            except ValueError as error:
                raise ValueError(f"{failure}: {error}; {self._what_remains()}") from None
        needed = sum(tensor.nbytes for named in state.tensors.values() for tensor in named.values())
        try:
            with make_folder(self._free_name(samples)) as folder:
                # Asked beforehand: a disk filled to its end also hurts whoever else writes there.
                if needed > shutil.disk_usage(folder).free:
                    raise OSError("the disk is full")
                write_checkpoint(folder, state, samples=samples, metric=metric, is_best=is_best)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{failure} ({error}): expected {needed:,} bytes of room at {self.folder}, got "
                f"{_free_bytes(self.folder):,}; make room or choose another --output; {self._what_remains()}"
            ) from error
        self._remove_old()

    def _restore(self, *, best: bool) -> Restored | None:
        self.wait()
        skipped = []
        for folder in self._folders():
            try:
                manifest = read_manifest(folder)
                if best and not manifest.is_best:
                    continue
                verify_files(folder, manifest)
            except DamagedCheckpointError as error:
                self._damaged.add(folder)
                skipped.append(str(error))
                continue
            lines = tuple(
                f"{line}; using an earlier checkpoint, after {manifest.samples:,} samples" for line in skipped
            )
            return Restored(state=read_state(folder), info=_describe(folder, manifest), skipped=lines)
        if skipped:
            kind, remedy = ("checkpoint", "begin anew with another --output")
            if best:
                kind, remedy = ("best checkpoint", "measure the last weights with --evaluation.no-test-best")
            raise ValueError(f"expected an intact {kind} in {self.folder}, got none ({'; '.join(skipped)}); {remedy}")
        return None

    def _remove_old(self) -> None:
        """Remove all but the last ones and the best; of those that cannot be read, what is newer stays too."""
        readable = [info for info in self.list() if info.folder not in self._damaged]
        newest = {info.samples: info.folder for info in reversed(readable)}
        last = sorted(newest.values(), key=_age)[-self.keep_last :]
        best = next((info.folder for info in readable if info.is_best), None)
        unreadable = set(self._folders()) - {info.folder for info in readable}
        spared = {folder for folder in unreadable if _age(folder) > _age(last[0])}
        for folder in self._folders():
            if folder not in spared and folder not in last and folder != best:
                remove_folder(folder)

    def _folders(self) -> tuple[Path, ...]:
        """Return the checkpoints' folders, newest first."""
        if not self.folder.is_dir():
            return ()
        found = (path for path in self.folder.iterdir() if NAME.fullmatch(path.name))
        return tuple(sorted(found, key=_age, reverse=True))

    def _free_name(self, samples: int) -> Path:
        """Return a name that is newer than any of as many samples, so that no name ever changes its content."""
        revisions = [revision for other, revision in map(_age, self._folders()) if other == samples]
        return self.folder / (f"samples-{samples:012d}" + (f".{max(revisions) + 1}" if revisions else ""))

    def _what_remains(self) -> str:
        samples = ", ".join(f"{_age(folder)[0]:,}" for folder in self._folders())
        return f"kept: the checkpoints after {samples} samples" if samples else "there is no earlier checkpoint"


def _age(folder: Path) -> tuple[int, int]:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _describe(folder: Path, manifest: Manifest) -> CheckpointInfo:
    return CheckpointInfo(
        folder=folder,
        samples=manifest.samples,
        metric=manifest.metric,
        is_best=manifest.is_best,
        bytes=sum(info.bytes for info in manifest.files.values()),
    )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
