"""Learning-rate schedules as pure functions of samples seen, so that a change of batch size does not bend them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dlrm.optim.schedule_text import parse_formula


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from start_factor to 1, hold at 1, polynomial decay to end_factor, constant after: a factor.

    It multiplies a learning rate, and `shape` multiplies it by any other formula. The dense part and the tables have
    one each, because a rate relative to the weights (LAMB) and one that is not want different warm-ups. All lengths are
    in samples over all ranks.

    Raises:
        ValueError: Naming the flag, for a number out of range.
    """

    warmup_samples: int = 0
    """Length of the linear warm-up from start_factor to 1; 0 starts at 1."""
    hold_samples: int = 0
    """Samples at factor 1 between warm-up and decay."""
    decay_samples: int = 0
    """Length of the decay from 1 to end_factor; 0 never decays."""
    decay_power: float = 1.0
    """Power of the decay: 1 is linear, 2 falls faster at first."""
    start_factor: float = 0.0
    """Factor at the very first sample of a warm-up."""
    end_factor: float = 0.0
    """Factor at the end of the decay and ever after."""
    shape: str = ""
    """Formulas that multiply all this, as "warmup(50_000) * cosine(1_450_000, end=0.1)"; docs/schedules.md lists them.
    In Python, the str of an expression of `dlrm.optim.decays` and `waves`."""

    def __post_init__(self) -> None:
        for name in ("warmup_samples", "hold_samples", "decay_samples"):
            self._check(name, getattr(self, name) >= 0, "a number of samples >= 0")
        self._check("decay_power", 0.0 < self.decay_power < math.inf, "a number > 0")
        for name in ("start_factor", "end_factor"):
            self._check(name, 0.0 <= getattr(self, name) < math.inf, "a number >= 0")
        try:
            self._shape_factor(0)
        except ValueError as error:
            raise ValueError(f"{_flags('shape')}: {error}") from None

    @property
    def warm_after(self) -> float:
        """Samples after which the warm-up is over."""
        return max(self.warmup_samples, parse_formula(self.shape).warmup_samples if self.shape else 0)

    @property
    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """(from sample, samples per step) where the shape has stages; empty otherwise."""
        return parse_formula(self.shape).batch_sizes if self.shape else ()

    def factor(self, samples: float) -> float:
        """Return the factor once ``samples`` (>= 0) have been seen.

        For a step, ask at the middle of its batch, samples before it + batch size / 2. At its start the first step of a
        warm-up from 0 would be lost, at its end the last step of a decay to 0, and a lost step costs as much as any.
        """
        return self._trapezoid(samples) * self._shape_factor(samples)

    def _shape_factor(self, samples: float) -> float:
        return parse_formula(self.shape).factor(samples) if self.shape else 1.0

    def _trapezoid(self, samples: float) -> float:
        if samples < self.warmup_samples:
            return self.start_factor + (1.0 - self.start_factor) * samples / self.warmup_samples
        decayed = samples - self.warmup_samples - self.hold_samples
        if self.decay_samples == 0 or decayed <= 0:
            return 1.0
        left = max(0.0, 1.0 - decayed / self.decay_samples)
        return self.end_factor + (1.0 - self.end_factor) * math.pow(left, self.decay_power)

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{_flags(name)}: expected {expected}, got {getattr(self, name)}")


def _flags(name: str) -> str:
    option = name.replace("_", "-")
    return f"--dense-schedule.{option} / --tables-schedule.{option}"
