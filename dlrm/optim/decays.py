"""Formulas that begin and end: warm-ups from below, and decays that fall once and stay."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from dlrm.optim.formulas import Formula, Length, Position, Positive, Shift, Size, Warmup, is_list, is_rising

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LinearWarmup(Formula):
    """From `start` in a straight line to 1 over so many samples."""

    name: ClassVar[str] = "warmup"

    samples: Warmup
    _: KW_ONLY
    start: Size = 0.0

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return 1.0 if samples >= self.samples else self.start + (1.0 - self.start) * samples / self.samples


@dataclass(frozen=True)
class ConstantWarmup(Formula):
    """A constant factor for so many samples, then 1."""

    name: ClassVar[str] = "constant_warmup"

    samples: Warmup
    _: KW_ONLY
    value: Size = 0.1

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return 1.0 if samples >= self.samples else float(self.value)


@dataclass(frozen=True)
class PolyDecay(Formula):
    """1 up to the sample `start`, then a power's fall to `end` over so many samples, which then holds.

    Attributes:
        samples: length of the fall.
        start: sample at which it begins.
        power: 1 is a straight line; the MLPerf DLRM reference takes 2.
        end: factor at its end and ever after.
        floor: no factor is below it, wherever the fall stands.
    """

    name: ClassVar[str] = "poly"

    samples: Length
    _: KW_ONLY
    start: Position = 0.0
    power: Positive = 2.0
    end: Size = 0.0
    floor: Size = 0.0

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        left = min(1.0, max(0.0, 1.0 - (samples - self.start) / self.samples))
        return max(self.floor, self.end + (1.0 - self.end) * math.pow(left, self.power))


@dataclass(frozen=True)
class WarmupRsqrtCooldown(Formula):
    """Warm-up, then one over a square root, which needs no end, and a linear cool-down to 0 wherever one is wanted.

    min(1, s / warmup) / sqrt(1 + (max(0, s - warmup) + shift) / timescale) * min(1, (until - s) / cooldown), s samples
    (Zhai et al. 2022, arXiv:2106.04560, section 3.5). One run without a cool-down is the trunk from which runs of
    several lengths branch off, each with its own `until`.

    Attributes:
        timescale: samples after which the rate has fallen to 1 / sqrt(2).
        warmup: length of the warm-up.
        until: sample at which the cool-down ends.
        cooldown: its length; 0 is none.
        shift: moves along the curve; see `continued`.
    """

    name: ClassVar[str] = "rsqrt"

    timescale: Length
    _: KW_ONLY
    warmup: Warmup = 0.0
    until: Position = 0.0
    cooldown: Position = 0.0
    shift: Shift = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "cooldown", self.until >= self.warmup + self.cooldown or not self.cooldown, "until - warmup or less"
        )
        self._check("shift", self.shift > -self.timescale, "more than -timescale")

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        rise = 1.0 if samples >= self.warmup else samples / self.warmup
        falling = max(0.0, samples - self.warmup) + self.shift
        fall = 1.0 / math.sqrt(1.0 + falling / self.timescale)
        end = min(1.0, max(0.0, self.until - samples) / self.cooldown) if self.cooldown else 1.0
        return rise * fall * end

    def continued(self, samples: float, ratio: float) -> WarmupRsqrtCooldown:
        """Return the formula that goes on from here with a base rate `ratio` times as high, without a jump.

        A larger batch has a higher base rate. `ratio` * the new factor equals the old one at `samples`, which must lie
        behind the warm-up, and from there on the rate falls as that of a run which had the new base rate all along.

        Raises:
            ValueError: the base rate is lower than the rate that is to be met.
        """
        beyond = max(0.0, samples - self.warmup)
        fallen = 1.0 + (beyond + self.shift) / self.timescale
        return replace(self, shift=self.timescale * (ratio**2 * fallen - 1.0) - beyond)


@dataclass(frozen=True)
class Step(Formula):
    """Times `gamma` after every so many samples."""

    name: ClassVar[str] = "step"

    samples: Length
    _: KW_ONLY
    gamma: Positive = 0.1

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return _power(self.gamma, samples // self.samples)


@dataclass(frozen=True)
class MultiStep(Formula):
    """Times `gamma` at each of the samples in `at`."""

    name: ClassVar[str] = "multistep"

    at: tuple[float, ...]
    _: KW_ONLY
    gamma: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("at", is_list(self.at) and is_rising(self.at), "rising samples, (700_000, 900_000)")
        object.__setattr__(self, "at", tuple(self.at))

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return _power(self.gamma, bisect_right(self.at, samples))

    def stretch(self, lengths: float, warmups: float = 1.0) -> Self:
        """See `Formula`."""
        return replace(self, at=tuple(sample * lengths for sample in self.at))


@dataclass(frozen=True)
class Exp(Formula):
    """Times `gamma` per so many samples, smoothly; a gamma above 1 rises, as range tests do."""

    name: ClassVar[str] = "exp"

    samples: Length
    _: KW_ONLY
    gamma: Positive = 0.1

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return _power(self.gamma, samples / self.samples)


@dataclass(frozen=True)
class Inverse(Formula):
    """(1 + s / samples) ** -power."""

    name: ClassVar[str] = "inverse"

    samples: Length
    _: KW_ONLY
    power: Positive = 1.0

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        return math.pow(1.0 + samples / self.samples, -self.power)


@dataclass(frozen=True)
class Sigmoid(Formula):
    """From 1 to `end` along a logistic curve, half-way at the sample `middle`.

    Attributes:
        middle: where the factor is (1 + end) / 2.
        width: samples over which 1 / (1 + exp(x)) goes from x to x + 1; the fall takes about ten of them.
        end: factor that is approached.
    """

    name: ClassVar[str] = "sigmoid"

    middle: Position
    _: KW_ONLY
    width: Length
    end: Size = 0.0

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        # 1 / (1 + exp(x)), which does not overflow.
        left = 0.5 * (1.0 - math.tanh(0.5 * (samples - self.middle) / self.width))
        return self.end + (1.0 - self.end) * left


@dataclass(frozen=True)
class Cosine(Formula):
    """Half a cosine from 1 to `end` over so many samples, which then holds (Loshchilov and Hutter 2017).

    Attributes:
        samples: length of the fall.
        start: sample at which it begins.
        end: factor at its end and ever after.
    """

    name: ClassVar[str] = "cosine"

    samples: Length
    _: KW_ONLY
    start: Position = 0.0
    end: Size = 0.0

    def factor(self, samples: float) -> float:
        """See `Formula`."""
        done = min(1.0, max(0.0, (samples - self.start) / self.samples))
        return self.end + (1.0 - self.end) * 0.5 * (1.0 + math.cos(math.pi * done))


def _power(gamma: float, exponent: float) -> float:
    """Return gamma ** exponent, at most e ** 700 rather than an overflow."""
    return math.exp(min(700.0, exponent * math.log(gamma)))
