"""Formulas that come back: a wave between two factors over and over, whose height may shrink from period to period."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from dlrm.optim.formulas import Formula, Length, Positive, Size


@dataclass(frozen=True)
class Wave(Formula):
    """low + (high - low) * shape(share of the period that is over) * shrinking.

    Attributes:
        samples: of one period.
        low: least factor.
        high: greatest factor of the first period.
        halve: halve the height after every period (the `2` of triangular2).
        gamma: shrink the height by this per period, smoothly (the `exp` of exp_range).
    """

    samples: Length
    _: KW_ONLY
    low: Size = 0.0
    high: Size = 1.0
    halve: bool = False
    gamma: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("high", self.high >= self.low, f"at least low = {self.low}")
        self._check("halve", isinstance(self.halve, bool), "True or False")
        self._check("gamma", self.gamma <= 1.0, "a number from 0 to 1")

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        periods = samples / self.samples
        whole = math.floor(periods)
        height = (self.high - self.low) * math.pow(self.gamma, periods)
        if self.halve:
            height = math.ldexp(height, -min(whole, 1100))
        return self.low + height * self.shape(periods - whole)

    @abstractmethod
    def shape(self, share: float) -> float:
        """Return the height, 0 to 1, where this share of the period is over."""


@dataclass(frozen=True)
class Triangular(Wave):
    """Up in a straight line and down again (Smith 2017, cyclical learning rates)."""

    name: ClassVar[str] = "triangular"

    def shape(self, share: float) -> float:
        """See `Wave`."""
        return 1.0 - abs(2.0 * share - 1.0)


@dataclass(frozen=True)
class Sine(Wave):
    """Up and down along half a sine, from `low` to `low`."""

    name: ClassVar[str] = "sine"

    def shape(self, share: float) -> float:
        """See `Wave`."""
        return math.sin(math.pi * share)


@dataclass(frozen=True)
class CosineWave(Wave):
    """Down and up along a whole cosine, from `high` to `high`."""

    name: ClassVar[str] = "cosine_wave"

    def shape(self, share: float) -> float:
        """See `Wave`."""
        return 0.5 * (1.0 + math.cos(2.0 * math.pi * share))


@dataclass(frozen=True)
class CosineRestarts(Wave):
    """Down along half a cosine, then again from `high` (Loshchilov and Hutter 2017, SGDR).

    Attributes:
        growth: every period is so many times as long as the one before it.
    """

    name: ClassVar[str] = "cosine_restarts"

    _: KW_ONLY
    growth: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("growth", self.growth >= 1.0, "a number >= 1")

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        if self.growth == 1.0:
            return super().factor(samples)
        # Period n ends after samples * (stretch ** (n + 1) - 1) / (stretch - 1); its share stands for all of a period.
        grown = 1.0 + samples / self.samples * (self.growth - 1.0)
        whole = math.floor(math.log(grown) / math.log(self.growth) + 1e-12)
        begun = (math.pow(self.growth, whole) - 1.0) / (self.growth - 1.0)
        share = (samples / self.samples - begun) / math.pow(self.growth, whole)
        return super().factor((whole + min(max(share, 0.0), 1.0 - 1e-12)) * self.samples)

    def shape(self, share: float) -> float:
        """See `Wave`."""
        return 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Sawtooth(Wave):
    """Down in a straight line, then again from `high`."""

    name: ClassVar[str] = "sawtooth"

    def shape(self, share: float) -> float:
        """See `Wave`."""
        return 1.0 - share
