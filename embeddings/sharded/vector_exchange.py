"""Vectors on their way to who asked for them, and gradients on the way back: what travels, and where it lies.

Both sides know all sizes from the ids. What a rank asks of itself does not travel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from embeddings.sharded.lanes import Lanes
from embeddings.shards import Exchange

Longs = NDArray[np.int64]

_FP16_TOP = 14  # powers of two up to 2**15 fit; one less, so that rounding up does too


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where vectors lie in a flat tensor.

    Attributes:
        size: Numbers in all.
        starts: [lanes]: where the vectors of the cells begin that this rank asks for, one after the other.
        asked_starts: [ranks, lanes of this rank]: of those that the ranks ask of this one.
        asked_sizes: Numbers that travel to or from each rank which asks; 0 for this one itself.
        sizes: Numbers that travel to or from each rank which is asked; 0 for this one itself.
    """

    size: int
    starts: Longs
    asked_starts: Longs
    asked_sizes: list[int]
    sizes: list[int]


class VectorExchange(Protocol):
    """Brings the vectors of cells from who holds the rows to who asked, and gradients back. All ranks take part."""

    def lay(self, num_cells: Longs, asked_of: Longs, asked_from: Longs) -> Places:
        """Finds a place for each vector.

        Args:
            num_cells: [cuts]: this rank's cells.
            asked_of: [ranks, lanes of this rank]: cells that each rank asks for.
            asked_from: [ranks]: how many numbers each rank asks for of the ranks before this one.
        """

    def open(self, places: Places) -> Tensor:
        """Returns a flat float32 tensor for one exchange."""

    def send_vectors(self, vectors: Tensor, places: Places) -> int:
        """Gives others what they asked of this rank, and gets what it asked of them; returns the bytes sent."""

    def send_gradients(self, vectors: Tensor, places: Places) -> int:
        """Gives others the gradients of what this rank asked of them, and gets theirs; returns the bytes sent."""


class NetworkExchange:
    """An all-to-all of vectors and one of gradients.

    Args:
        lanes: Of the plan.
        rank: This rank.
        exchange: The type in which they travel; on both sides they are float32. In ``"fp16"`` each message is
            multiplied by a power of two that brings its largest number to between 2**14 and 2**15, and which travels
            in front of it: gradients of a mean over a large batch would fall below what float16 can tell from 0, and
            rows could lie above. Smaller than the largest by more than 2**38, a number becomes 0. ``"bf16"`` has
            float32's range and 8 bits of precision.
    """

    def __init__(self, lanes: Lanes, rank: int, exchange: Exchange) -> None:
        self._lanes, self._rank, self._exchange = lanes, rank, exchange

    def lay(self, num_cells: Longs, asked_of: Longs, asked_from: Longs) -> Places:
        """First what others ask of this rank, then what it asks of itself, then what it asks of others."""
        lanes, rank = self._lanes, self._rank
        mine = slice(lanes.owners[rank], lanes.owners[rank + 1])
        asked = asked_of * lanes.width[mine]
        order = [*(r for r in range(lanes.ranks) if r != rank), rank]
        asked_starts = np.empty_like(asked)
        asked_starts[order] = np.cumsum(asked[order]).reshape(asked.shape) - asked[order]
        numbers = num_cells[lanes.cut] * lanes.width
        numbers[mine] = 0
        starts = int(asked.sum()) + np.cumsum(numbers) - numbers
        starts[mine] = asked_starts[rank]
        asked_sizes = asked.sum(axis=1)
        asked_sizes[rank] = 0
        return Places(
            size=int(asked.sum() + numbers.sum()),
            starts=starts,
            asked_starts=asked_starts,
            asked_sizes=asked_sizes.tolist(),
            sizes=[int(numbers[lanes.owners[r] : lanes.owners[r + 1]].sum()) for r in range(lanes.ranks)],
        )

    def open(self, places: Places) -> Tensor:
        """Returns a new tensor."""
        return torch.empty(places.size)

    def send_vectors(self, vectors: Tensor, places: Places) -> int:
        """Sends what others asked of this rank and receives what it asked of them; returns the bytes sent."""
        return self._send(vectors, places, backward=False)

    def send_gradients(self, vectors: Tensor, places: Places) -> int:
        """Sends gradients of what this rank asked of others, and receives theirs; returns the bytes sent."""
        return self._send(vectors, places, backward=True)

    def _send(self, vectors: Tensor, places: Places, *, backward: bool) -> int:
        asked, own = sum(places.asked_sizes), places.size - sum(places.asked_sizes) - sum(places.sizes)
        leaving, arriving = vectors[:asked], vectors[asked + own :]
        leaving_sizes, arriving_sizes = places.asked_sizes, places.sizes
        if backward:
            leaving, arriving, leaving_sizes, arriving_sizes = arriving, leaving, arriving_sizes, leaving_sizes
        if self._exchange == "fp32":
            dist.all_to_all_single(arriving, leaving, arriving_sizes, leaving_sizes)
            return leaving.nbytes
        if self._exchange == "bf16":
            words = leaving.to(torch.bfloat16)
            received = torch.empty(len(arriving), dtype=torch.bfloat16)
            _send_words(received, words, arriving_sizes, leaving_sizes)
            arriving.copy_(received)
            return words.nbytes
        # An empty message has no scale either.
        leaving_words, arriving_words = _with_scales(leaving_sizes), _with_scales(arriving_sizes)
        words = torch.empty(sum(leaving_words), dtype=torch.float16)
        received = torch.empty(sum(arriving_words), dtype=torch.float16)
        for numbers, message in zip(leaving.split(leaving_sizes), words.split(leaving_words), strict=True):
            _scale_down(numbers, message)
        _send_words(received, words, arriving_words, leaving_words)
        for numbers, message in zip(arriving.split(arriving_sizes), received.split(arriving_words), strict=True):
            if len(message):
                # In float32: what is small once it is scaled back would be 0 in float16.
                numbers.copy_(message[1:]).mul_(2.0 ** -float(message[0]))
        return words.nbytes


def _with_scales(sizes: Sequence[int]) -> list[int]:
    return [size + 1 if size else 0 for size in sizes]


def _scale_down(numbers: Tensor, message: Tensor) -> None:
    if not len(message):
        return
    largest = float(torch.linalg.vector_norm(numbers, math.inf))
    exponent = _FP16_TOP - math.frexp(largest)[1] + 1 if math.isfinite(largest) and largest > 0 else 0
    message[0] = exponent = min(exponent, 126)
    torch.mul(numbers, 2.0**exponent, out=message[1:])


def _send_words(received: Tensor, words: Tensor, arriving: Sequence[int], leaving: Sequence[int]) -> None:
    # As bytes: gloo does not know every type.
    dist.all_to_all_single(
        received.view(torch.uint8),
        words.view(torch.uint8),
        [words.element_size() * size for size in arriving],
        [words.element_size() * size for size in leaving],
    )
