"""What the source formats have in common: which files, which columns, which blocks, and the tables of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dlrm.data.criteo import find_criteo
from dlrm.data.movielens import MovieLensFiles, find_movielens, join_attributes
from dlrm.data.schema import DataSchema, SourceFormat
from dlrm.data.source import Block, TextBlocks, TextForm, find_files, one_line, read_header
from dlrm.data.tabular import Wanted, parse_text, plan_parquet, read_parquet

CSV_DELIMITERS = (",", ";", "|", "\t")
PATTERNS = {
    "csv": ("*.csv", "*.csv.*"),
    "tsv": ("*.tsv", "*.tsv.*", "*.txt", "*.txt.*"),
    "parquet": ("*.parquet", "*.pq"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a schema's format, with the columns of each.

    Attributes:
        files: of the events, in chronological order where `split.by` is `order`.
        forms: how each is written; None for parquet files.
        joined: user and item files, for the MovieLens format.
    """

    files: tuple[Path, ...]
    forms: tuple[TextForm | None, ...]
    columns: tuple[tuple[str, ...], ...]
    joined: MovieLensFiles | None = None

    @property
    def all_files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        more = [Path(file.path) for _, file in self.joined.attributes] if self.joined else []
        return (*self.files, *more)


@dataclass(frozen=True, kw_only=True)
class BlockParser:
    """Turns a block into tables; small enough to be sent to every process."""

    wanted: Wanted
    joined: MovieLensFiles | None = field(default=None)

    def read(self, block: Block) -> bytes:
        """Return the text of a block."""
        with open(block.path, "rb") as file:
            file.seek(block.start)
            return file.read(block.stop - block.start)

    def tables(self, block: Block, text: bytes) -> Iterator[pa.Table]:
        """Yield the tables of a block's chunks, with the wanted columns."""
        if block.form is None:
            yield from read_parquet(block, self.wanted)
        elif self.joined is None:
            yield parse_text(block, text, self.wanted)
        else:
            keys = Wanted({key: self.wanted.types.get(key, pa.string()) for key, _ in self.joined.attributes})
            here = self.wanted.only(block.form.columns)
            yield join_attributes(parse_text(block, text, Wanted(keys.types | here.types)), self.joined, self.wanted)


def open_source(schema: DataSchema, sources: Sequence[Path | str]) -> Source:
    """Find the files of a source and check that they have the columns of the schema.

    Raises:
        ValueError: a file is absent or of another form, or a column is absent; it is named with what was found.
    """
    source = find_source(schema.format, [Path(source) for source in sources])
    for file, columns in zip(source.files, source.columns, strict=True):
        for name in Wanted.of(schema).types:
            if columns and name not in columns:
                raise ValueError(
                    f"{file}: expected a column '{name}', found {', '.join(columns)}; correct the schema's `{name}`"
                )
    check_names(source, tuple(Wanted.of(schema).types))
    return source


def check_names(source: Source, wanted: Sequence[str]) -> None:
    """Check that each column that will be read is there once.

    Raises:
        ValueError: a file has two columns of one name.
    """
    for file, columns in zip(source.files, source.columns, strict=True):
        twice = next((name for name in wanted if columns.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{file}: expected one column '{twice}', found {columns.count(twice)}; rename one")


def find_source(kind: SourceFormat, paths: Sequence[Path]) -> Source:
    """Find the files of a source and read what columns they have.

    Raises:
        ValueError: a file is absent or of another form.
    """
    if kind == "movielens":
        joined = find_movielens(paths)
        inter = joined.interactions
        return Source(files=(Path(inter.path),), forms=(inter.form,), columns=(tuple(joined.columns),), joined=joined)
    if kind == "parquet":
        files = find_files(paths, PATTERNS["parquet"])
        return Source(files=files, forms=(None,) * len(files), columns=tuple(map(_parquet_columns, files)))
    if kind == "criteo":
        pairs = find_criteo(paths)
    else:
        pairs = [(file, read_text_form(file, kind)) for file in find_files(paths, PATTERNS[kind])]
    return Source(
        files=tuple(file for file, _ in pairs),
        forms=tuple(form for _, form in pairs),
        columns=tuple(form.columns for _, form in pairs),
    )


def _parquet_columns(file: Path) -> tuple[str, ...]:
    try:
        return tuple(pq.read_schema(file).names)
    except (pa.ArrowInvalid, OSError) as error:
        problem = one_line(error)
        raise ValueError(
            f"{file} cannot be read as parquet ({problem}); fetch it again, or correct `format`"
        ) from error


def read_text_form(file: Path, kind: str) -> TextForm:
    """Return the form of a CSV or TSV file with a header; commas may be semicolons, bars or tabs as well."""
    # TSV files as a rule do not quote, and hold single quotation marks; a quoted header says otherwise.
    delimiter, quoted = "\t", any('"' in cell for cell in read_header(file, "\t", quoted=False))
    if kind == "csv":
        quoted = True
        delimiter = max(CSV_DELIMITERS, key=lambda mark: len(read_header(file, mark, quoted=True)))
    columns = read_header(file, delimiter, quoted=quoted)
    return TextForm(columns=columns, delimiter=delimiter, quoted=quoted, has_header=True)


def plan_blocks(
    source: Source, wanted: Wanted, *, block_bytes: int, scratch: Path, is_done: Callable[[int], bool]
) -> Iterable[Block]:
    """Return the blocks of a source, in its order; compressed text is decompressed into `scratch` as they are taken."""
    if source.forms[0] is None:
        return plan_parquet([(str(file), file.stat().st_size) for file in source.files], wanted, block_bytes)
    files = [(file, form) for file, form in zip(source.files, source.forms, strict=True) if form is not None]
    return TextBlocks(files, block_bytes=block_bytes, scratch=scratch, is_done=is_done)
