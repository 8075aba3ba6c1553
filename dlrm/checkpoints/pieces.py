"""Tensors that lie in pieces, on ranks or in files: any rectangle can be read, and nobody must hold the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 22  # read at a time: large enough for a disk, small beside a rank's memory


class Far(NamedTuple):
    """Rows in another process, several tensors side by side: to read them for one is to read them for all.

    Attributes:
        read_rows: gives rows [start, stop) of all of these tensors by name; of one set of them, the same function.
        name: of this tensor among them.
    """

    read_rows: Callable[[int, int], Mapping[str, Tensor]]
    name: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rectangle of a tensor of at most two dimensions.

    Attributes:
        first: where it begins in the whole: `(row, column)`, `(row,)` or `()`.
        shape: of the piece.
        read: gives rows [start, stop) of the piece; all of it if it has no dimension.
        far: of one that another process holds, and that is saved block by block, as it never lies in memory as a whole.
    """

    first: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    far: Far | None = None

    def whole(self) -> Tensor:
        """Give all of the piece."""
        return self.read(0, self.shape[0] if self.shape else 0)


@dataclass(frozen=True, kw_only=True)
class PartedTensor:
    """A tensor, or those of its pieces that are at hand; they do not overlap.

    Attributes:
        shape: of the whole.
        dtype: of every piece.
        pieces: in any order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """Return the whole in memory of its own.

        Raises:
            ValueError: some of it is not at hand.
        """
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out, (0,) * len(self.shape))
        return out

    def blocks(self) -> Iterator[Tensor]:
        """Give the whole as blocks of rows, one in memory at a time."""
        if len(self.shape) == 0:
            yield self.read()
            return
        step = self._rows_per_block(self.shape)
        for start in range(0, self.shape[0], step):
            out = torch.empty((min(step, self.shape[0] - start), *self.shape[1:]), dtype=self.dtype)
            self.read_into(out, (start, *(0 for _ in self.shape[1:])))
            yield out

    @torch.no_grad()
    def read_into(self, out: Tensor, first: tuple[int, ...]) -> None:
        """Set `out` to the rectangle that begins at `first` and has its shape; reads what overlaps, block by block.

        Raises:
            ValueError: `out` has another type or reaches beyond the whole, or some of it is not at hand.
        """
        if out.dtype != self.dtype:
            raise ValueError(f"expected numbers of type {out.dtype}, got {self.dtype}")
        found = 0
        for piece in self.pieces:
            inner = [
                (max(mine, its), min(mine + length, its + size))
                for mine, length, its, size in zip(first, out.shape, piece.first, piece.shape, strict=True)
            ]
            if all(start < stop for start, stop in inner):
                found += math.prod(stop - start for start, stop in inner)
                self._copy(piece, inner, out, first)
        if found != out.numel():
            raise ValueError(
                f"expected {out.numel()} numbers from {first} on, got {found}: not every piece of it is there"
            )

    def _copy(self, piece: Piece, inner: list[tuple[int, int]], out: Tensor, first: tuple[int, ...]) -> None:
        if not inner:
            out.copy_(piece.whole())
            return
        (start, stop), *columns = inner
        here = tuple(slice(a - at, b - at) for (a, b), at in zip(columns, first[1:], strict=True))
        there = tuple(slice(a - at, b - at) for (a, b), at in zip(columns, piece.first[1:], strict=True))
        step = self._rows_per_block(piece.shape)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            block = piece.read(begin - piece.first[0], end - piece.first[0])
            out[(slice(begin - first[0], end - first[0]), *here)].copy_(block[(slice(None), *there)])

    def _rows_per_block(self, shape: tuple[int, ...]) -> int:
        return max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * self.dtype.itemsize))

    def check_tiled(self, name: str) -> None:
        """Check that the pieces make up the whole.

        Raises:
            ValueError: naming the tensor.
        """
        numbers = sum(math.prod(piece.shape) for piece in self.pieces)
        firsts = {piece.first for piece in self.pieces if math.prod(piece.shape)}
        distinct = len(firsts) == sum(math.prod(piece.shape) > 0 for piece in self.pieces)
        if numbers != math.prod(self.shape) or not distinct:
            raise ValueError(
                f"{name}: expected pieces of {math.prod(self.shape)} numbers over all ranks, got {numbers}"
            )


class Parts(dict[str, PartedTensor]):
    """Parted tensors by name: a top-level entry of a state, of which every rank saves the pieces that it holds."""


def piece_of(tensor: Tensor, first: tuple[int, ...]) -> Piece:
    """Make a piece of a live tensor."""
    return Piece(
        first=first,
        shape=tuple(tensor.shape),
        read=lambda start, stop: tensor[start:stop] if tensor.ndim else tensor,
    )


def as_parts(stored: Mapping[str, PartedTensor | Tensor]) -> Parts:
    """Return stored tensors in parts; those of format 1 are whole."""
    return Parts(
        {
            name: tensor
            if isinstance(tensor, PartedTensor)
            else PartedTensor(
                shape=tuple(tensor.shape), dtype=tensor.dtype, pieces=(piece_of(tensor, (0,) * tensor.ndim),)
            )
            for name, tensor in stored.items()
        }
    )


def name_piece(name: str, first: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> str:
    """Give a piece the tensor's name, with its rows and columns unless it is the whole: `a.weight[0:5, 8:16]`."""
    if shape == whole:
        return name
    return f"{name}[{', '.join(f'{at}:{at + length}' for at, length in zip(first, shape, strict=True))}]"


def describe_pieces(parts: Parts, file: str) -> dict[str, Any]:
    """Say, as JSON has it, which piece of which tensor lies in `file`, and under what name."""
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "pieces": [
                {
                    "file": file,
                    "name": name_piece(name, piece.first, piece.shape, tensor.shape),
                    "first": list(piece.first),
                    "shape": list(piece.shape),
                }
                for piece in tensor.pieces
            ],
        }
        for name, tensor in parts.items()
    }


def merge_pieces(descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what ranks say of their pieces, tensor by tensor.

    Raises:
        ValueError: they are of different wholes.
    """
    merged: dict[str, Any] = {}
    for name, tensor in itertools.chain.from_iterable(description.items() for description in descriptions):
        known = merged.setdefault(name, tensor | {"pieces": []})
        if (known["shape"], known["dtype"]) != (tensor["shape"], tensor["dtype"]):
            raise ValueError(
                f"{name}: expected {known['dtype']} {known['shape']} on every rank, "
                f"got {tensor['dtype']} {tensor['shape']}"
            )
        known["pieces"] = known["pieces"] + tensor["pieces"]
    return merged
