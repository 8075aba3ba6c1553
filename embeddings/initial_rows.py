"""The rows a table starts with, as a pure function of the seed and the table, whatever kernel holds them."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from embeddings.tables import TableConfig


def initial_rows(config: TableConfig, *, seed: int) -> Tensor:
    """Draws a table's first rows: [num_rows, dim] float32 on the CPU, uniform in [-scale, scale).

    The stream depends on the seed and the table's name only, so adding, removing or reordering tables leaves the
    others as they were. Philox is counter-based: a shard can start in the middle of it.
    """
    # Python's hash() of a string differs from process to process.
    name_hash = int.from_bytes(hashlib.blake2b(config.name.encode(), digest_size=8).digest(), "little")
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, name_hash])))
    rows = np.empty((config.num_rows, config.dim), dtype=np.float32)
    stream.random(dtype=np.float32, out=rows)
    scale = np.float32(config.initial_scale)
    rows *= 2 * scale
    rows -= scale
    return torch.from_numpy(rows)
