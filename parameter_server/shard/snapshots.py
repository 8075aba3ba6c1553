"""Snapshots of a shard in a folder: what changed since the one before, in files that a manifest names and describes.

``<number>-base`` and ``<number>-increment`` are folders of safetensors files, see ``state_parts``, and a
``manifest.json``. They are written under another name first, so that each is there whole or not at all. An increment
goes on from the snapshot numbered one less; after some of them all are merged into a base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from safetensors.numpy import load_file, save_file

from embeddings.kernels.hash_kernels import NUM_BUCKETS
from parameter_server.shard.state_parts import Mask, Part
from parameter_server.shard.synced_files import sync_path

MANIFEST = "manifest.json"
FORMAT = 1
_BASE, _INCREMENT = "base", "increment"
_READ_BYTES = 4 << 20


class TakenPart(NamedTuple):
    """What becomes a file.

    Attributes:
        part: Its content.
        journal: Number of the first record of the journal that is not in the snapshot up to here.
        buckets: [4096], whose rows and marks alone it holds; None: any.
    """

    part: Part
    journal: int = 0
    buckets: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a manifest says of a file: its length, the XXH3 of its bytes, and from where to where its buckets are."""

    name: str
    bytes: int
    xxh3: str
    first_bucket: int = 0
    end_bucket: int = NUM_BUCKETS


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot that lies in a folder.

    Attributes:
        folder: Its own.
        number: Counts up.
        is_base: Whether it needs none before it.
        files: In the order in which they are to be put.
        journal: Number of the first record that is not in it.
    """

    folder: Path
    number: int
    is_base: bool
    files: tuple[FileEntry, ...]
    journal: int

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    def parts(self, buckets: Mask | None = None) -> Iterator[Part]:
        """Reads the files, one after the other; of those about some buckets, only the ones about ``buckets`` [4096]."""
        for file in self.files:
            is_of_all = file.end_bucket - file.first_bucket == NUM_BUCKETS  # and says more than what is in buckets
            if buckets is None or is_of_all or buckets[file.first_bucket : file.end_bucket].any():
                yield load_file(self.folder / file.name)


class SnapshotFolder:
    """The snapshots of a shard.

    Args:
        folder: Made if it is not there; what was never finished is removed.
        is_read_only: Leave all as it is.

    Attributes:
        chain: The snapshots that together say the newest state: a base, and increments on it.
        passed_over: A line for each damaged snapshot that was not used.
    """

    def __init__(self, folder: Path, *, is_read_only: bool = False) -> None:
        self._folder = folder
        if not is_read_only:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*"):
                shutil.rmtree(left)
        self.passed_over: list[str] = []
        self.chain = self._find_chain()
        self._last = max([_number_of(path) for path in _list(folder)], default=0)

    def write(self, parts: Iterable[TakenPart]) -> Snapshot:
        """Writes a snapshot that goes on from the newest one, or a base if there is none.

        Raises:
            OSError: It could not be written; what was written of it is removed.
        """
        kind = _INCREMENT if self.chain else _BASE
        number = self.chain[-1].number + 1 if self.chain else self._last + 1
        written = self._write(number, kind, parts)
        self.chain.append(written)
        self._last = number
        return written

    def replace_all(self, parts: Iterable[TakenPart]) -> Snapshot:
        """Writes the newest state as a base, and removes all others.

        Raises:
            OSError: It could not be written; what was written of it is removed.
        """
        newest = self.chain[-1]
        base = self._write(newest.number, _BASE, (part._replace(journal=newest.journal) for part in parts))
        self.chain = [base]
        self.remove_others()
        return base

    def remove_others(self) -> None:
        """Removes the snapshots that the newest state does not need."""
        needed = {snapshot.folder for snapshot in self.chain}
        for path in _list(self._folder):
            if path not in needed:
                shutil.rmtree(path)

    def _write(self, number: int, kind: str, parts: Iterable[TakenPart]) -> Snapshot:
        final = self._folder / f"{number:08d}-{kind}"
        scratch = self._folder / f".{final.name}"
        scratch.mkdir()
        try:
            files: list[FileEntry] = []
            journal = 0
            for taken in parts:
                files.append(_write_part(scratch, len(files), taken))
                journal = taken.journal
            written = Snapshot(folder=final, number=number, is_base=kind == _BASE, files=tuple(files), journal=journal)
            _write_manifest(scratch, written)
            sync_path(scratch)
            if final.exists():  # damaged, and passed over
                shutil.rmtree(final)
            scratch.rename(final)
            sync_path(self._folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return written

    def _find_chain(self) -> list[Snapshot]:
        """Finds the newest snapshot that is whole down to its base."""
        whole: dict[tuple[int, bool], Snapshot] = {}
        for path in _list(self._folder):
            try:
                snapshot = _read_snapshot(path)
                whole[snapshot.number, snapshot.is_base] = snapshot
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.passed_over.append(f"{path}: snapshot passed over: {error}")
        for newest in sorted({number for number, _ in whole}, reverse=True):
            chain: list[Snapshot] = []
            for number in range(newest, 0, -1):
                found = whole.get((number, True)) or whole.get((number, False))
                if found is None:
                    break
                chain.insert(0, found)
                if found.is_base:
                    return chain
            self.passed_over.append(
                f"{self._folder}: snapshot {newest} passed over: one that it goes on from is missing"
            )
        return []


def _list(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.glob("*-*") if path.name.endswith((_BASE, _INCREMENT)) and path.name[0] != "."
    )


def _number_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _write_part(folder: Path, index: int, taken: TakenPart) -> FileEntry:
    path = folder / f"{index:06d}.safetensors"
    save_file(taken.part, path)
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
    sync_path(path)
    named = [0, NUM_BUCKETS - 1] if taken.buckets is None else np.flatnonzero(taken.buckets).tolist()
    first, end = (named[0], named[-1] + 1) if named else (0, 0)
    size = path.stat().st_size
    return FileEntry(name=path.name, bytes=size, xxh3=_digest(path), first_bucket=first, end_bucket=end)


def _write_manifest(folder: Path, snapshot: Snapshot) -> None:
    content = {"format": FORMAT, "journal": snapshot.journal, "files": [asdict(file) for file in snapshot.files]}
    path = folder / MANIFEST
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    sync_path(path)


def _read_snapshot(folder: Path) -> Snapshot:
    """Reads a manifest and checks the files.

    Raises:
        OSError, ValueError, KeyError, TypeError: They are not as they were written.
    """
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {content['format']!r}")
    files = tuple(FileEntry(**file) for file in content["files"])
    for file in files:
        path = folder / file.name
        if (size := path.stat().st_size) != file.bytes:
            raise ValueError(f"expected {file.bytes} bytes in {file.name}, got {size}")
        if (digest := _digest(path)) != file.xxh3:
            raise ValueError(f"expected digest {file.xxh3} of {file.name}, got {digest}")
    is_base = folder.name.endswith(_BASE)
    return Snapshot(
        folder=folder, number=_number_of(folder), is_base=is_base, files=files, journal=int(content["journal"])
    )


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
