"""Reads some rows of a tensor in a safetensors file, and writes tensors larger than memory into one.

The library's own slices read the whole tensor, or map it, and then its pages count as this process's memory; its
writer wants every tensor of a file in memory at once. The format is eight bytes with the length of a header, the
header as JSON with type, shape and place of every tensor, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ALIGNMENT = 8


class Entry(NamedTuple):
    """What a file says of one tensor; its bytes begin at `start`, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """The tensors of one safetensors file; nothing is kept open."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor's type, shape and place."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {
            name: Entry(TYPES[info["dtype"]], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
            for name, info in header.items()
            if name != "__metadata__"
        }

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Read rows [first, last) of a tensor; all of it if it has no dimension.

        Raises:
            OSError: the file is shorter than its header says.
        """
        dtype, shape, start = self.entries[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        out = torch.empty((last - first, *shape[1:]) if shape else (), dtype=dtype)
        if out.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(start + (first * row if shape else 0))
                _fill(file.readinto, out.reshape(-1).view(torch.uint8).numpy().data, self.path)
        return out


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], blocks: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a safetensors file of which no more than a block is in memory at a time.

    Args:
        path: of the file.
        shapes: name -> type and shape.
        blocks: name -> its rows in order, as contiguous CPU tensors of any number of rows each.

    Raises:
        OSError: a write failed, for instance because the disk is full.
    """
    write_blocks(path, shapes, ((name, block) for name in shapes for block in blocks(name)))


def write_blocks(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], blocks: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a safetensors file as `write_tensors`, whose tensors' blocks may come side by side.

    Args:
        path: of the file.
        shapes: name -> type and shape.
        blocks: name, and that tensor's next rows.

    Raises:
        OSError: a write failed, for instance because the disk is full.
    """
    codes = {dtype: code for code, dtype in TYPES.items()}
    header: dict[str, Any] = {}
    place = 0
    # Large items first, so that every tensor begins at a multiple of its item's size.
    for name in sorted(shapes, key=lambda name: -shapes[name][0].itemsize):
        dtype, shape = shapes[name]
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    begin = 8 + len(text)
    places = {name: begin + info["data_offsets"][0] for name, info in header.items()}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + place)
        for name, block in blocks:
            file.seek(places[name])
            places[name] += file.write(block.reshape(-1).view(torch.uint8).numpy().data)
    for name, info in header.items():
        if places[name] != begin + info["data_offsets"][1]:
            raise ValueError(f"{path.name}: expected all rows of {name}, got {info['shape']} in part")


def _fill(read_into: Callable[[memoryview], int | None], view: memoryview, path: Path) -> None:
    while view:
        count = read_into(view)
        if not count:
            raise OSError(f"{path}: expected {len(view)} bytes more, got the file's end")
        view = view[count:]
