"""Cuts source files into blocks: pieces of bounded size, of whole rows, that can be parsed on their own."""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
UNSUPPORTED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
HEADER_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LOOK_AT_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """How the rows of a text file are written.

    Attributes:
        columns: their names, in the file's order.
        delimiter: between cells.
        quoted: cells may be quoted, and then hold delimiters and line breaks.
        has_header: the first row is no data.
    """

    columns: tuple[str, ...]
    delimiter: str
    quoted: bool
    has_header: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of a source file.

    Attributes:
        index: of its first chunk; blocks and chunks are numbered in the order of the source.
        chunks: it is cut into so many.
        source: the file the user named.
        path: where the bytes lie: `source`, or what was decompressed from it.
        start: first byte; in parquet files, first row.
        stop: end of the bytes; in parquet files, end of the rows.
        first_line: number of the first line in `source`, from 1.
        form: how the text is written; None for parquet files.
        row_group: of a parquet file.
        share: of the bytes of all sources.
    """

    index: int
    chunks: int = 1
    source: str
    path: str
    start: int
    stop: int
    first_line: int = 1
    form: TextForm | None = None
    row_group: int = 0
    share: float = 0.0


def find_files(sources: Sequence[Path | str], patterns: Sequence[str]) -> tuple[Path, ...]:
    """Return the files that `sources` name: files, folders, or globs; in natural order (`day_2` before `day_10`).

    Args:
        sources: as the user gave them; several keep their order.
        patterns: what to look for in a folder; the first that finds anything decides.

    Raises:
        ValueError: a source names no file.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found: Iterable[Path] = next((hits for pattern in patterns if (hits := [*path.rglob(pattern)])), [])
            found = [file for file in found if file.is_file() and not file.name.startswith((".", "_"))]
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file()]
        if not found:
            wanted = f" matching {', '.join(patterns)}" if path.is_dir() else ""
            raise ValueError(f"expected a file, a folder or a pattern, found no files{wanted} at {source}")
        files += sorted(found, key=_natural_order)
    return tuple(files)


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def read_head(path: Path, size: int = HEADER_BYTES) -> bytes:
    """Return the first bytes of a file's text, decompressed.

    Raises:
        ValueError: the file is empty, damaged, in another encoding or packed in a way that is not supported.
    """
    with open_text(path) as (stream, _):
        text = bytes(stream.read(size)).removeprefix(BOM)
    if not text:
        raise ValueError(f"{path}: expected a header and rows, found an empty file; fetch it again, or leave it out")
    if text.startswith(UTF_16) or b"\0" in text[:LOOK_AT_BYTES]:
        what = "UTF-16" if text.startswith(UTF_16) else "zero bytes, as in UTF-16 or a binary file"
        raise ValueError(f"{path}: expected text in UTF-8, got {what}; convert it to UTF-8, or correct `format`")
    return text


def read_header(path: Path, delimiter: str, quoted: bool) -> tuple[str, ...]:
    """Return the cells of the first row of a text file."""
    text = read_head(path).decode("utf-8", errors="replace")
    lines = io.StringIO(text, newline="")
    if quoted:
        return tuple(next(csv.reader(lines, delimiter=delimiter), ()))
    return tuple(next(csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE), ()))


def one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())


@contextmanager
def open_text(path: Path | str) -> Iterator[tuple[Any, Callable[[], int]]]:
    """Open a text file, plain, gz or zst; gives its stream, and a function that says how many of its bytes were read.

    Raises:
        ValueError: the file is damaged, or packed in a way that is not supported.
    """
    with open(path, "rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        packed = next((name for start, name in UNSUPPORTED.items() if magic.startswith(start)), None)
        if packed:
            raise ValueError(f"{path}: expected plain text, gz or zst, got {packed}; unpack it first")
        compression = next((name for start, name in MAGIC.items() if magic.startswith(start)), None)
        try:
            yield pa.CompressedInputStream(raw, compression) if compression else raw, raw.tell
        except OSError as error:
            if error.errno is not None:
                raise
            raise ValueError(f"{path} is damaged or cut short ({one_line(error)}); fetch it again") from error


class TextBlocks:
    """Reads text files one after the other and cuts them at the ends of rows.

    Args:
        files: with the form of each.
        block_bytes: of text in one block, at most.
        scratch: folder for what is decompressed; whoever consumes a block deletes its file.
        is_done: says of a block's index that nobody needs the block any more.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, TextForm]],
        *,
        block_bytes: int,
        scratch: Path,
        is_done: Callable[[int], bool],
    ) -> None:
        self._files, self._block_bytes, self._scratch, self._is_done = files, block_bytes, scratch, is_done
        self._total = sum(path.stat().st_size for path, _ in files) or 1

    def __iter__(self) -> Iterator[Block]:
        index = 0
        for path, form in self._files:
            with open_text(path) as (stream, position):
                consumed = 0
                compressed = isinstance(stream, pa.NativeFile)
                for start, first_line, text in self._cut(path, stream, form):
                    share, consumed = position() - consumed, position()
                    block = Block(
                        index=index,
                        source=str(path),
                        path=str(self._scratch / f"{index:06d}.text") if compressed else str(path),
                        start=0 if compressed else start,
                        stop=len(text) if compressed else start + len(text),
                        first_line=first_line,
                        form=form,
                        share=share / self._total,
                    )
                    if compressed and not self._is_done(index):
                        self._unpack(Path(block.path), text)
                    yield block
                    index += 1

    def _cut(self, path: Path, stream: Any, form: TextForm) -> Iterator[tuple[int, int, bytes]]:
        rest, start, line = b"", 0, 1
        skip = form.has_header
        while text := rest + stream.read(self._block_bytes - len(rest)):
            at_end = len(text) < self._block_bytes
            end = len(text) if at_end else last_row_end(text, form.quoted)
            if not end:
                raise ValueError(
                    f"{path}, line {line}: expected a row of at most {self._block_bytes} bytes, found no end of one; "
                    "correct the quotes, or raise block_bytes"
                )
            block, rest = text[:end], text[end:]
            if not start and block.startswith(BOM):
                block, start = block[len(BOM) :], len(BOM)
            if skip:
                header = _first_row_end(block, form.quoted)
                line += block.count(b"\n", 0, header)
                block, start, skip = block[header:], start + header, False
            if block and not block.isspace():
                yield start, line, block
            start, line = start + len(block), line + block.count(b"\n")

    def _unpack(self, path: Path, text: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_bytes(text)
        os.replace(scratch, path)


def last_row_end(text: bytes, quoted: bool) -> int:
    """Return where the last whole row ends, given that `text` begins with a row; 0 if there is no end of a row."""
    end = text.rfind(b"\n")
    if not quoted:
        return end + 1
    quotes = text.count(b'"', 0, end + 1)
    while end >= 0 and quotes % 2:
        before = text.rfind(b"\n", 0, end)
        quotes -= text.count(b'"', before + 1, end + 1)
        end = before
    return end + 1


def _first_row_end(text: bytes, quoted: bool) -> int:
    end = text.find(b"\n")
    while quoted and end >= 0 and text.count(b'"', 0, end) % 2:
        end = text.find(b"\n", end + 1)
    return end + 1 or len(text)
