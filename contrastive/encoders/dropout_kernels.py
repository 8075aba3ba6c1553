"""Random numbers by counting and hashing, and dropout with them, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embeddings.kernels.compiled import compiled

LEVELS = 1 << 16
"""Values of a random number."""


@compiled
def fill_words(key: np.uint64, words: NDArray[np.uint64]) -> None:
    """Writes random words: SplitMix64 (Steele, Lea and Flood 2014) from `key` on.

    Args:
        key: Sets the words apart from others'.
        words: [n], written; each is four numbers of 16 bits.
    """
    for i in range(words.size):
        # Written out instead of calling `mix`: so the loop is compiled to vectors.
        word = key + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words[i] = word ^ (word >> np.uint64(31))


@compiled
def drop(
    x: NDArray[np.float32],
    chances: NDArray[np.uint16],
    kept: np.uint16,
    scale: np.float32,
    out: NDArray[np.float32],
) -> None:
    """Writes `x` times `scale` where the chance is below `kept`, 0 elsewhere.

    Args:
        x: [n].
        chances: [n] or more.
        kept: Of LEVELS; of the chances' own type, for the loop to become vectors.
        scale: The kept ones' factor.
        out: [n], written.
    """
    for i in range(x.size):
        out[i] = x[i] * scale if chances[i] < kept else np.float32(0)
