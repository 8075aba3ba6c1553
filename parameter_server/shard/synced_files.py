"""Files that a power cut leaves whole: written beside, synced, and put in place at once."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk.

    Raises:
        OSError: They could not be written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, whatever ends the process.

    Raises:
        OSError: It could not be written.
    """
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    sync_path(scratch)
    os.replace(scratch, path)
    sync_path(path.parent)
