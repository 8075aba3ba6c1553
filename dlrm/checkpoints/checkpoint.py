"""Keeps the checkpoints of a run: written in the background, there whole or not at all, and checked when read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dlrm.checkpoints.atomic_folder import publish, share_folder
from dlrm.checkpoints.checkpoint_folder import (
    complete_checkpoint,
    own_part,
    read_state,
    write_done,
    write_rank_files,
)
from dlrm.checkpoints.finite_state import check_finite
from dlrm.checkpoints.kept_checkpoints import (
    CheckpointInfo,
    age_of,
    describe_checkpoint,
    find_checkpoints,
    free_name,
    list_checkpoints,
    remove_old,
    say_what_remains,
    was_saved,
)
from dlrm.checkpoints.manifest import DamagedCheckpointError, Manifest, read_manifest, verify_files
from dlrm.checkpoints.shared_saves import SharedSaves
from dlrm.checkpoints.state_tree import FlatState, flatten
from dlrm.distributed.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A state that was read back, and one line for each damaged checkpoint that was passed over."""

    state: dict[str, Any]
    info: CheckpointInfo
    skipped: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, a folder each: `samples-000000065536` and so on.

    `save` copies the state and returns; a thread writes the copy. The copy's memory is kept for the next save, so that
    a run that saves needs room for its state twice. One run at a time may save into a folder; any process may read.

    On several ranks every call but `list` is made by all of them, as it is a collective one or waits for the others.
    A rank saves its pieces of what is parted (`Parts`) and what is each rank's own; all else is rank 0's. A checkpoint
    of any number of ranks is restored by any other. How they settle it: see `shared_saves`.

    Args:
        folder: made at the first save, or by several ranks at once.
        keep_last: checkpoints that are kept; the best one is kept besides.
        finite: refuse to write a state whose tensors hold NaN or infinities.
        ranks: who saves and restores together.
        timeout_seconds: after which ranks that write nothing are given up.
        read_only: leave alone what dead ones have left, and whatever else is in the folder.

    Raises:
        ValueError: `keep_last` is below 1, or a rank does not see the folder.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        keep_last: int = 3,
        finite: bool = True,
        ranks: Ranks = ALONE,
        timeout_seconds: float = 600.0,
        read_only: bool = False,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"--checkpoint.keep-last: expected at least 1, got {keep_last}")
        self.folder, self.keep_last, self.finite, self.ranks = Path(folder), keep_last, finite, ranks
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._damaged: set[Path] = set()
        self._pending: Future[None] | None = None
        self._saves = 0
        self._awaited_samples: int | None = None
        self._shared = SharedSaves(self.folder, ranks, timeout_seconds, read_only=read_only)

    def save(
        self, state: Mapping[str, object], *, samples: int, metric: float | None = None, is_best: bool = False
    ) -> None:
        """Copy a state now, and write it in the background; waits first until the save before it is on disk.

        What other processes hold is not copied but read block by block, and then the call returns when all is on disk.

        Args:
            state: nested dict, list and tuple of tensors, str, int, float, bool and None; each top-level key with
                tensors below it gets a file. What comes back is equal, its tensors contiguous and on the CPU.
                A top-level value may be `Parts`.
            samples: how far the run has come; replaces a checkpoint of as many samples.
            metric: what `list` shows; NaN counts as None.
            is_best: this is the best state so far.

        Raises:
            ValueError: the state holds something else than the above, or the save before this one failed.
        """
        self.wait()
        flat = flatten(state if self.ranks.is_first else own_part(state))
        flat.tensors = self._copy(flat.tensors)
        self._saves += 1
        self._awaited_samples = samples
        self._pending = self._start(lambda: self._write(flat, samples, metric, is_best))
        if flat.far:
            self.wait()  # they are read as they are written, and training would change them meanwhile

    def wait(self) -> None:
        """Wait until everything that was asked for is on disk, of all ranks.

        Raises:
            ValueError: the last save failed, as the disk is full or the state not finite; earlier ones are still there.
        """
        if self._pending is not None:
            wait((self._pending,))  # apart from asking for the result, so that Ctrl-C in between forgets nothing
            done, self._pending = self._pending, None
            try:
                done.result()
            except BaseException:
                self._awaited_samples = None
                raise
        if self._awaited_samples is not None:
            awaited, self._awaited_samples = self._awaited_samples, None
            if not self.ranks.is_first:
                self._shared.wait_for_checkpoint(self._saves, lambda save: was_saved(self.folder, save, awaited))

    def restore_latest(self, *, at_most: int | None = None) -> Restored | None:
        """Read the newest checkpoint whose checksums hold; None if there is none at all.

        Args:
            at_most: samples after which it was saved.

        Raises:
            ValueError: every checkpoint is damaged, or the newest is of another format version.
        """
        return self._restore(best=False, at_most=at_most)

    def restore_best(self) -> Restored | None:
        """Read the newest intact checkpoint that was saved as the best; None if none was.

        Raises:
            ValueError: as `restore_latest`.
        """
        return self._restore(best=True)

    def restore(self, folder: Path) -> Restored:
        """Read one checkpoint of this folder.

        Raises:
            DamagedCheckpointError: it is damaged.
            ValueError: it is of another format version.
        """
        manifest = self._read_manifest(folder)
        self._raise_damage(folder, manifest)
        return Restored(state=read_state(folder, manifest, self.ranks.rank), info=describe_checkpoint(folder, manifest))

    def list(self) -> tuple[CheckpointInfo, ...]:
        """Return what there is, newest first, going by manifests alone; one without a readable manifest is left out."""
        return list_checkpoints(self.folder)

    def _copy(self, tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        before, self._copies = self._copies, {}
        for group, named in tensors.items():
            for name, tensor in named.items():
                copy = before.pop((group, name), None)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
                self._copies[group, name] = copy.copy_(tensor)
        return {group: {name: self._copies[group, name] for name in named} for group, named in tensors.items()}

    def _start(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        # One process ends after its write. A rank does not stay for others, which may be dead.
        Thread(target=run, name="checkpoint", daemon=self.ranks.count > 1).start()
        return future

    def _write(self, state: FlatState, samples: int, metric: float | None, is_best: bool) -> None:
        failure = f"the checkpoint after {samples:,} samples was not written"
        needed = state.num_bytes
        try:
            if self.finite:
                check_finite(state)
            self._write_files(state, needed, samples=samples, metric=metric, is_best=is_best)
        except ValueError as error:
            if str(error).startswith("rank "):
                raise  # another one's, who told it
            told = f"{failure}: {error}; {say_what_remains(self.folder)}"
            self._shared.tell_failure(self._saves, told)
            raise ValueError(told) from None
        except (OSError, SafetensorError) as error:
            self._shared.raise_failure(self._saves)  # which may be why the folder has gone
            told = (
                f"{failure} ({error}): expected {needed:,} bytes of room at {self.folder}, got "
                f"{_free_bytes(self.folder):,}; make room or choose another --output; {say_what_remains(self.folder)}"
            )
            self._shared.tell_failure(self._saves, told)
            raise ValueError(told) from error
        finally:
            if self.ranks.is_first:  # only after its words, by which the others know why the folder has gone
                shutil.rmtree(self._shared.scratch(self._saves), ignore_errors=True)
        if self.ranks.is_first:
            remove_old(self.folder, self.keep_last, self._damaged)

    def _write_files(self, state: FlatState, needed: int, **described: Any) -> None:
        save, rank = self._saves, self.ranks.rank
        with share_folder(self._shared.scratch(save)) as folder:
            # Asked beforehand: a disk filled to its end also hurts whoever else writes there.
            if needed > shutil.disk_usage(folder).free:
                raise OSError("the disk is full")
            written = write_rank_files(folder, state, rank, finite=self.finite)
            if rank:
                write_done(folder, rank, written)
                return
            ranks = [written, *self._shared.wait_for_files(save)]
            complete_checkpoint(folder, state, ranks, save=self._shared.name(save), **described)
            publish(folder, free_name(self.folder, described["samples"]))

    def _restore(self, *, best: bool, at_most: int | None = None) -> Restored | None:
        self.wait()
        skipped = []
        there = [f.name for f in find_checkpoints(self.folder) if at_most is None or age_of(f)[0] <= at_most]
        for name in self.ranks.object_from_first(there):
            folder = self.folder / name
            try:
                if best and not self._read_manifest(folder).is_best:
                    continue
                restored = self.restore(folder)
            except DamagedCheckpointError as error:
                self._damaged.add(folder)
                skipped.append(str(error))
                continue
            lines = (
                f"{line}; using an earlier checkpoint, after {restored.info.samples:,} samples" for line in skipped
            )
            return replace(restored, skipped=tuple(lines))
        if skipped:
            kind, remedy = ("checkpoint", "begin anew with another --output")
            if best:
                kind, remedy = (
                    "best checkpoint",
                    "name another checkpoint, or measure the last weights with --evaluation.no-test-best",
                )
            raise ValueError(f"expected an intact {kind} in {self.folder}, got none ({'; '.join(skipped)}); {remedy}")
        return None

    def _read_manifest(self, folder: Path) -> Manifest:
        """Return what rank 0 reads; its error is raised on all ranks."""
        read: Manifest | ValueError | None = None
        if self.ranks.is_first:
            try:
                read = read_manifest(folder)
            except ValueError as error:
                read = error
        read = self.ranks.object_from_first(read)
        if isinstance(read, Manifest):
            return read
        assert read is not None
        raise read

    def _raise_damage(self, folder: Path, manifest: Manifest) -> None:
        """Check every file on one of the ranks; the first damage is raised on all."""
        names = list(manifest.files)
        if self.ranks.count > 1:
            names = sorted(names, key=lambda name: -manifest.files[name].bytes)[self.ranks.rank :: self.ranks.count]
        damage = None
        try:
            verify_files(folder, manifest, names)
        except DamagedCheckpointError as error:
            damage = error
        self.ranks.raise_any(damage)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
