"""Interactions with the attributes of their users and items: `.inter`, `.user` and `.item` files with typed headers.

The first row names each column and its type, tab-separated: `user_id:token`, `age:float`, `genres:token_seq` (ids
separated by spaces). MovieLens and many other sets exist in this form (https://recbole.io/docs/user_guide/data/atomic_files.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from dlrm.data.cells import BadCell
from dlrm.data.source import Block, TextForm, find_files, open_text, read_header
from dlrm.data.tabular import Wanted, find_line, parse_text

TYPES = ("token", "float", "token_seq", "float_seq")
ATTRIBUTES = {".user": "user_id", ".item": "item_id"}


@dataclass(frozen=True, kw_only=True)
class TypedFile:
    """A file with a typed header; `types` in the order of `form.columns`."""

    path: str
    form: TextForm
    types: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MovieLensFiles:
    """The interactions, and files whose rows are joined to them by `key`."""

    interactions: TypedFile
    attributes: tuple[tuple[str, TypedFile], ...]

    @property
    def columns(self) -> dict[str, str]:
        """Every column with its type."""
        found: dict[str, str] = {}
        for file in (self.interactions, *(file for _, file in self.attributes)):
            found |= {name: kind for name, kind in zip(file.form.columns, file.types, strict=True) if name not in found}
        return found


def find_movielens(sources: Sequence[Path]) -> MovieLensFiles:
    """Return the `.inter` file, and the `.user` and `.item` files of the same name where there are some.

    Raises:
        ValueError: there is not exactly one `.inter` file, or a header is not typed.
    """
    found = [path for path in find_files(sources, ("*.inter",)) if path.suffix == ".inter"]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise ValueError(f"expected one .inter file in {', '.join(map(str, sources))}, got {names}; name one")
    beside = [(key, found[0].with_suffix(suffix)) for suffix, key in ATTRIBUTES.items()]
    return MovieLensFiles(
        interactions=_read_typed_header(found[0]),
        attributes=tuple((key, _read_typed_header(path)) for key, path in beside if path.is_file()),
    )


def _read_typed_header(path: Path) -> TypedFile:
    cells = [cell.rpartition(":") for cell in read_header(path, "\t", quoted=False)]
    for name, _, kind in cells:
        if not name or kind not in TYPES:
            raise ValueError(
                f"{path}, line 1: expected `name:type` with a type of {', '.join(TYPES)}, got '{name or kind}'; "
                "correct the header"
            )
    form = TextForm(columns=tuple(name for name, _, _ in cells), delimiter="\t", quoted=False, has_header=True)
    return TypedFile(path=str(path), form=form, types=tuple(kind for _, _, kind in cells))


def join_attributes(table: pa.Table, files: MovieLensFiles, wanted: Wanted) -> pa.Table:
    """Add the wanted columns of users and items to a table of interactions; absent where a user or item is unknown."""
    for key, file in files.attributes:
        names = tuple(name for name in file.form.columns if name in wanted.types and name not in table.column_names)
        if not names:
            continue
        attributes = _read_attributes(file, key, Wanted({key: pa.string()} | wanted.only(names).types))
        keys = table.column(key).combine_chunks()
        keys = keys.dictionary_decode() if pa.types.is_dictionary(keys.type) else keys
        place = pc.index_in(keys, value_set=attributes.column(key).combine_chunks())
        for name in names:
            table = table.append_column(name, attributes.column(name).combine_chunks().take(place))
    return table


def _read_attributes(file: TypedFile, key: str, wanted: Wanted) -> pa.Table:
    return _read_whole(file, key, tuple(wanted.types.items()))


@lru_cache(maxsize=4)
def _read_whole(file: TypedFile, key: str, types: tuple[tuple[str, pa.DataType], ...]) -> pa.Table:
    with open_text(file.path) as (stream, _):
        text = bytes(stream.read())
    _, _, rows = text.partition(b"\n")
    block = Block(index=0, source=file.path, path=file.path, start=0, stop=len(rows), first_line=2, form=file.form)
    try:
        table = parse_text(block, rows, Wanted(dict(types)))
        keys = table.column(key).combine_chunks()
        repeated = pc.not_equal(pc.index_in(keys, value_set=keys), pa.array(range(len(keys)), pa.int32()))
        if pc.any(repeated).as_py():
            row = pc.index(repeated, True).as_py()
            raise BadCell(key, row, f"expected each value once, got '{keys[row]}' again; remove the row")
    except BadCell as bad:
        raise ValueError(f"{file.path}, line {find_line(block, rows, bad.row)}: {bad}") from bad
    return table
