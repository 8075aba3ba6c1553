"""Random numbers that belong to a sample: the same ones whatever batch it comes in, and after a resumption.

Number j of a sample is a hash of (seed, sample, j): the generator SplitMix64 of Steele, Lea and Flood 2014 ("Fast
splittable pseudorandom number generators"), whose state counts up and is mixed, so that any number is drawn at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dlrm.data.dataset import IntArray

Words: TypeAlias = "NDArray[np.uint64]"
Doubles: TypeAlias = "NDArray[np.float64]"

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT, _UNUSED_BITS = np.uint64(31), np.uint64(11)


@dataclass(frozen=True)
class Draws:
    """Random numbers of B samples.

    Attributes:
        keys: [B], the state of each sample's generator.
    """

    keys: Words

    @staticmethod
    def of(seed: int, samples: IntArray) -> Draws:
        """Return the generators of samples, by their numbers in the stream."""
        start = mix(np.array([seed], dtype=np.int64).view(np.uint64) + _STEP)
        return Draws(mix(mix(samples.astype(np.int64, copy=False).view(np.uint64) + start) + start))

    def fork(self, purposes: IntArray | int) -> Draws:
        """Return generators of their own for a purpose (of each sample, or of all): 0, 1, 2, ..."""
        # Other numbers than those of `words`, which count up from the key.
        return Draws(mix(~self.keys + _steps(purposes)))

    def take(self, samples: IntArray) -> Draws:
        """Return the generators of some of the samples."""
        return Draws(self.keys[samples])

    def words(self, numbers: IntArray | int) -> Words:
        """Return 64 random bits: number `numbers` of each sample, one number for all or [B]."""
        return mix(self.keys + _steps(numbers))

    def below(self, bounds: IntArray, number: int) -> IntArray:
        """Return [B], whole numbers in [0, bounds[i]), all equally likely."""
        share: Doubles = (self.words(number) >> _UNUSED_BITS).astype(np.float64) * 2.0**-53
        return (share * bounds).astype(np.int64)


def _steps(numbers: IntArray | int) -> Words:
    # at least [1]: numpy warns where single numbers overflow, as they are meant to
    return (np.atleast_1d(np.asarray(numbers, dtype=np.int64)).view(np.uint64) + np.uint64(1)) * _STEP


def mix(words: Words) -> Words:
    """Return a permutation of 64-bit numbers under which each bit depends on every other."""
    for shift, factor in _MIXERS:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> _LAST_SHIFT)
