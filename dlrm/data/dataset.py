"""The prepared dataset: a folder of memory-mapped Arrow files, and the description that makes sense of them.

- `dataset.json`: what the columns are, and every part with its number of rows and checksum.
- `train/part-00000.arrow` ..., `valid/`, `test/`: one record batch each, with `label` uint8, `numeric` a fixed-size
  list of float32, one column per feature (int32 or int64, or a list of these), and further columns as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import xxhash

from dlrm.data.info_file import read_info

FORMAT_VERSION = 1
DESCRIPTION = "dataset.json"
LABEL, NUMERIC = "label", "numeric"
OPEN_PARTS = 8  # the pages of an open one count as memory of the process once they were read

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"
Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """A categorical feature: ids lie in [0, num_rows)."""

    name: str
    num_rows: int
    is_list: bool = False


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """One file of a split; `xxh3` is the checksum of its bytes."""

    file: str
    rows: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The contents of `dataset.json`.

    Attributes:
        numeric: names of the columns of `Batch.dense`, in order.
        features: the categorical features, in order.
        splits: the parts of train, valid and test, in order of time.
        time_ranges: first and last time (or row of the source) of each split.
        extra: further columns of every part, such as `time` or the known click probability.
        origin: where the rows came from and how they were encoded.
    """

    numeric: tuple[str, ...]
    features: tuple[FeatureInfo, ...]
    splits: dict[str, tuple[PartInfo, ...]]
    time_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write `dataset.json`, atomically: a folder without it is not yet a dataset."""
        target = folder / DESCRIPTION
        scratch = target.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, target)


@dataclass(frozen=True, kw_only=True)
class Bags:
    """Ids of a list feature: bag i is values[offsets[i] : offsets[i + 1]]."""

    offsets: IntArray
    values: IntArray


@dataclass(frozen=True, kw_only=True)
class Part:
    """The columns of one file, as views of the memory map (nothing is read before it is used)."""

    label: Array
    numeric: Array
    features: dict[str, IntArray | Bags]
    extra: dict[str, Array]


def write_part(folder: Path, split: str, index: int, part: Part) -> PartInfo:
    """Write one part of a split so that it is there whole or not at all."""
    columns: dict[str, pa.Array] = {LABEL: pa.array(part.label.astype(np.uint8, copy=False))}
    rows, width = part.numeric.shape
    flat = np.ascontiguousarray(part.numeric, dtype=np.float32).reshape(-1)
    if width:
        columns[NUMERIC] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    for name, ids in part.features.items():
        columns[name] = (
            pa.LargeListArray.from_arrays(pa.array(ids.offsets.astype(np.int64)), pa.array(ids.values))
            if isinstance(ids, Bags)
            else pa.array(ids)
        )
    columns |= {name: pa.array(values) for name, values in part.extra.items()}
    batch = pa.record_batch(columns)
    target = folder / split / f"part-{index:05d}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(scratch), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    os.replace(scratch, target)
    return PartInfo(file=f"{split}/{target.name}", rows=rows, xxh3=checksum(target))


def checksum(path: Path) -> str:
    """Return the XXH3 (128 bit) checksum of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Dataset:
    """A prepared dataset, opened for reading.

    Args:
        folder: what `recforge prepare` wrote.
        info: its description, where it is not written yet.

    Raises:
        ValueError: the folder is no prepared dataset, of another format version, or a part is damaged.
    """

    def __init__(self, folder: Path | str, info: DatasetInfo | None = None) -> None:
        self.folder = Path(folder)
        self.info = info or read_info(
            self.folder / DESCRIPTION,
            DatasetInfo,
            FORMAT_VERSION,
            expected="a prepared dataset",
            remedy="run `recforge prepare SOURCE OUT`",
        )
        self._open_part = lru_cache(maxsize=OPEN_PARTS)(self._open)

    def rows(self, split: str) -> int:
        """Return the number of rows of a split; 0 if there is no such split."""
        return sum(part.rows for part in self.info.splits.get(split, ()))

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the description, which holds every part's: datasets that agree in it are the same."""
        return xxhash.xxh3_128((self.folder / DESCRIPTION).read_bytes()).hexdigest()

    def part(self, split: str, index: int) -> Part:
        """Return a part's columns, memory-mapped."""
        return self._open_part(split, index)

    def column(self, split: str, name: str, rows: IntArray) -> Array:
        """Return values of one column (label, a feature with one id per row, or a further one) at `rows` of a split."""
        firsts = np.cumsum([0] + [part.rows for part in self.info.splits[split]])
        parts = np.searchsorted(firsts, rows, side="right") - 1
        out: Array | None = None
        for index in np.unique(parts):
            part, here = self.part(split, int(index)), parts == index
            source = part.label if name == LABEL else part.extra.get(name, part.features.get(name))
            if not isinstance(source, np.ndarray):
                raise ValueError(f"expected a column with one value per row, got '{name}'; {self._known_columns()}")
            out = np.empty(len(rows), dtype=source.dtype) if out is None else out
            out[here] = source[rows[here] - firsts[index]]
        return np.empty(0) if out is None else out

    def verify(self) -> None:
        """Read every part and compare checksums.

        Raises:
            ValueError: a part is absent or its bytes are not those that were written; it is named.
        """
        for parts in self.info.splits.values():
            for part in parts:
                path = self.folder / part.file
                if not path.is_file() or checksum(path) != part.xxh3:
                    raise ValueError(f"{path} is not what `prepare` wrote (checksum); prepare the data again")

    def _known_columns(self) -> str:
        single = [feature.name for feature in self.info.features if not feature.is_list]
        return "columns: " + ", ".join([*single, *self.info.extra])

    def _open(self, split: str, index: int) -> Part:
        info = self.info.splits[split][index]
        path = self.folder / info.file
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read ({error}); prepare the data again") from error
        if batch.num_rows != info.rows:
            raise ValueError(f"{path}: expected {info.rows} rows, got {batch.num_rows}; prepare the data again")
        width = len(self.info.numeric)
        numeric = (
            batch.column(NUMERIC).flatten().to_numpy().reshape(-1, width)
            if width
            else np.empty((batch.num_rows, 0), dtype=np.float32)
        )
        return Part(
            label=batch.column(LABEL).to_numpy(),
            numeric=numeric,
            features={feature.name: _ids(batch.column(feature.name)) for feature in self.info.features},
            extra={name: batch.column(name).to_numpy() for name in self.info.extra},
        )


def _ids(column: pa.Array) -> IntArray | Bags:
    if isinstance(column, pa.LargeListArray):
        return Bags(offsets=column.offsets.to_numpy(), values=column.values.to_numpy())
    ids: IntArray = column.to_numpy()
    return ids
