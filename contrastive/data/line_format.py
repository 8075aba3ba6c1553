"""Reads files of one line per user: the user's name, then the numbers of the items, the oldest first."""

from __future__ import annotations

import io
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from contrastive.data.sequences import SequenceData
from dlrm.data.source import BOM, find_files, open_text, read_head

PATTERNS = ("*.txt", "*.txt.*")
MOST_ITEMS = 2**31 - 1  # a number above this is no number of an item, but would be the length of a table
SMALL_CATALOGUE, ITEMS_PER_ACTION = 1_000_000, 100  # a catalogue that is larger than both is a slip
SHOWN = 40


def read_lines(sources: Sequence[Path | str], num_items: int | None = None) -> SequenceData:
    """Read all users of these files; empty lines are passed over.

    Args:
        sources: files (plain, gz or zst), folders or globs.
        num_items: of the catalogue; None takes the largest number that occurs.

    Raises:
        ValueError: a file is absent or empty, a line is broken, a user comes twice, or an item lies outside the
            catalogue; file and line are named.
    """
    most = MOST_ITEMS if num_items is None else num_items
    places: dict[bytes, tuple[Path, int]] = {}
    actions, ends, largest = array("q"), array("q", [0]), (0, "")
    files = find_files(sources, PATTERNS)
    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"{file}: expected lines 'user item item ...', found an empty file; fetch it again")
        read_head(file, 1 << 10)
        for number, cells in _split_lines(file):
            place = f"{file}, line {number}"
            user, *items = cells
            if (before := places.setdefault(user, (file, number))) != (file, number):
                raise ValueError(
                    f"{place}: expected each user on one line, got '{_show(user)}' again, first in {before[0]}, line "
                    f"{before[1]}; join the two lines"
                )
            numbers = _read_items(items, most, num_items, place)
            largest = max(largest, (max(numbers), place))
            actions.extend(numbers)
            ends.append(len(actions))
    if not places:
        raise ValueError(f"expected lines 'user item item ...' in {', '.join(map(str, files))}, found none")
    items_here, place = largest
    if num_items is None and items_here > max(SMALL_CATALOGUE, ITEMS_PER_ACTION * len(actions)):
        raise ValueError(
            f"{place}: expected items numbered from 1, got {items_here} in a source of {len(actions)} actions; correct "
            "the line, or say how many items there are by --schema.num-items"
        )
    return SequenceData(
        users=_decode(list(places), list(places.values())),
        items=pa.array(map(str, range(1, (num_items or items_here) + 1)), pa.large_string()),
        offsets=np.frombuffer(ends, dtype=np.int64),
        actions=np.frombuffer(actions, dtype=np.int64),
        places=list(places.values()),
    )


def _split_lines(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    with open_text(file) as (stream, _):
        lines = io.BufferedReader(stream) if isinstance(stream, pa.NativeFile) else stream
        for number, line in enumerate(lines, start=1):
            if cells := (line.removeprefix(BOM) if number == 1 else line).split():
                yield number, cells


def _read_items(cells: list[bytes], most: int, num_items: int | None, place: str) -> list[int]:
    if not cells:
        raise ValueError(f"{place}: expected a user and at least one item, got one word; correct or remove the line")
    if not b"".join(cells).isdigit():
        bad = next(cell for cell in cells if not cell.isdigit())
        raise ValueError(f"{place}: expected numbers of items (1, 2, ...), got '{_show(bad)}'; correct the line")
    items = [int(cell[:SHOWN]) for cell in cells]  # what is longer is too large however it ends
    if min(items) < 1 or max(items) > most:
        bad_item = next(item for item in items if not 1 <= item <= most)
        is_outside = num_items is not None and bad_item > most
        cure = "raise --schema.num-items, or correct the line" if is_outside else "correct it"
        raise ValueError(f"{place}: expected items from 1 to {most}, got {str(bad_item)[:SHOWN]}; {cure}")
    return items


def _decode(names: list[bytes], places: list[tuple[Path, int]]) -> pa.LargeStringArray:
    try:
        return pa.array([name.decode() for name in names], pa.large_string())
    except UnicodeDecodeError as error:
        file, line = places[names.index(error.object)]
        raise ValueError(f"{file}, line {line}: expected text in UTF-8, got {error.object!r}; convert it") from error


def _show(cell: bytes) -> str:
    return cell.decode(errors="replace")[:SHOWN]
