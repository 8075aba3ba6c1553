"""Reads the description that prepared data carry: one error for each way in which it may not be what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import cattrs

Info = TypeVar("Info")


def read_info(file: Path, kind: type[Info], version: int, *, expected: str, remedy: str) -> Info:
    """Read a description.

    Args:
        file: JSON with a `format_version`.
        kind: dataclass of what it holds.
        version: of the format that this release reads.
        expected: what the folder should be, for the error.
        remedy: what to do about it, for the error.

    Raises:
        ValueError: it is not there, damaged, or of another version.
    """
    if not file.is_file():
        raise ValueError(f"expected {expected} in {file.parent}, found no {file.name}; {remedy}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw.get("format_version")
        if found == version:
            return cattrs.structure(raw, kind)
    except (ValueError, AttributeError, cattrs.BaseValidationError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}); {remedy}") from error
    raise ValueError(f"{file}: expected format version {version}, got {found}; {remedy}")
