"""The rows a table starts with, as a pure function of the seed and the table, whatever kernel or rank holds them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from embeddings.tables import TableConfig

if TYPE_CHECKING:  # processes that hold rows and compute nothing start without it
    from torch import Tensor

_DRAWS_PER_COUNT = 8  # Philox makes four 64-bit numbers of one count, and a float32 takes half of one
_CHUNK = 1 << 20  # numbers drawn at a time where only some columns are kept


def initial_rows(
    config: TableConfig,
    *,
    seed: int,
    first_row: int = 0,
    num_rows: int | None = None,
    first_column: int = 0,
    num_columns: int | None = None,
) -> Tensor:
    """Draws a table's first rows, or a rectangle of them: float32 on the CPU, uniform in [-scale, scale).

    The stream depends on the seed and the table's name only, so adding, removing or reordering tables leaves the
    others as they were. Philox is counter-based: what comes before the first row wanted is never drawn.

    Returns:
        [num_rows, num_columns], from ``first_row`` and ``first_column`` on; by default to the end of the table.
    """
    import torch

    num_rows = config.num_rows - first_row if num_rows is None else num_rows
    num_columns = config.dim - first_column if num_columns is None else num_columns
    if config.initial_scale == 0:  # drawing takes seconds per gigabyte
        return torch.zeros(num_rows, num_columns)
    rows = np.empty((num_rows, num_columns), dtype=np.float32)
    stream = _stream_from(config, seed, first_row * config.dim)
    if num_columns == config.dim:
        stream.random(dtype=np.float32, out=rows)
    else:
        columns = slice(first_column, first_column + num_columns)
        step = max(1, _CHUNK // config.dim)
        for first in range(0, num_rows, step):
            some = rows[first : first + step]
            some[:] = stream.random((some.shape[0], config.dim), dtype=np.float32)[:, columns]
    scale = np.float32(config.initial_scale)
    rows *= 2 * scale
    rows -= scale
    return torch.from_numpy(rows)


def stream_key(config: TableConfig, seed: int) -> tuple[np.uint64, np.uint64]:
    """Gives the key of the Philox stream that a table's first rows are drawn from."""
    first, second = _stream_bits(config, seed).state["state"]["key"]
    return np.uint64(first), np.uint64(second)


def random_stream(config: TableConfig, seed: int, updates: int) -> int:
    """Gives 63 bits that set the random numbers of one update of a table apart from all others'."""
    return _hash(f"{seed} {updates} {config.name}") >> 1


def _stream_from(config: TableConfig, seed: int, draws: int) -> np.random.Generator:
    bits = _stream_bits(config, seed)
    bits.advance(draws // _DRAWS_PER_COUNT)
    stream = np.random.Generator(bits)
    stream.random(draws % _DRAWS_PER_COUNT, dtype=np.float32)
    return stream


def _stream_bits(config: TableConfig, seed: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, _hash(config.name)]))


def _hash(text: str) -> int:
    # Python's hash() of a string differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
