"""Finds the prepared dataset of a run, and makes it first where it does not exist yet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash
from filelock import FileLock
from tqdm import tqdm

from dlrm.data.dataset import DESCRIPTION, Dataset
from dlrm.data.schema import DataSchema
from dlrm.data.synthetic import SyntheticConfig, generate

FOLDER = Path("datasets")


def provide_dataset(source: str | tuple[DataSchema, tuple[Path, ...]], data: Path | None) -> Dataset:
    """Open `data` if it is prepared, else prepare it once under `datasets/`.

    Args:
        source: a recipe's source, or the schema and the files of a configuration.
        data: `--data`; None for the synthetic log or a configuration's own files.

    Raises:
        ValueError: nothing to read was named, it does not exist, or it does not fit the source.
    """
    if data is not None and (data / DESCRIPTION).is_file():
        return Dataset(data)
    if source == "synthetic":
        if data is not None:
            raise ValueError(f"--data: expected a prepared dataset, got {data}; leave it out to have a log generated")
        return _generate()
    if isinstance(source, str):
        if data is None:
            raise ValueError(f"--data: expected the files of recipe '{source}' or a prepared dataset, got nothing")
        from dlrm.data.known import known_schema

        schema, name = known_schema(source), source
        files: tuple[Path, ...] = (data,)
    else:
        schema, files, name = source[0], source[1] if data is None else (data,), "own"
    from dlrm.data.prepare import prepare, source_identity

    places = "\n".join(str(file.resolve()) for file in files)
    folder = FOLDER / f"{name}-{digest(f'{places}{source_identity(schema, files)}')}"
    print(f"recforge: preparing {', '.join(map(str, files))} into {folder}", file=sys.stderr)
    with alone_in(folder):
        return prepare(schema, files, folder)


def _generate() -> Dataset:
    config = SyntheticConfig()
    folder = FOLDER / f"synthetic-{digest(str(config))}"
    if (folder / DESCRIPTION).is_file():
        return Dataset(folder)
    with alone_in(folder), tqdm(desc=f"generating {folder}", unit=" rows", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return generate(config, folder, progress=show)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes that make the same data, of which those that come later then find it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def digest(text: str) -> str:
    """Return a short name for what a text describes."""
    return xxhash.xxh3_64_hexdigest(text.encode())
