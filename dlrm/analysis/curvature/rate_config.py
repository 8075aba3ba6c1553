"""What a user says about a learning rate that follows the loss's curvature; free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CurvatureRateConfig:
    """The dense part's rate and momentum from the Hessian's extreme eigenvalues, with `--dense.name sgd` only.

    Raises:
        ValueError: naming the flag, for a number out of range.
    """

    every_samples: int | None = None
    """Measure after so many samples, on a batch that is trained anyway; None leaves rate and momentum alone."""
    steps: int = 10
    """Products with the Hessian per measurement (of two backward passes each); 5 to 20."""
    noise_cut: float = 1e-3
    """Eigenvalues below this share of the largest count as noise; the smallest above decides the momentum."""
    smoothing: float = 0.5
    """How much of the eigenvalues so far stays when new ones come, in their logarithms."""
    share: float = 0.1
    """Of the rate that would be best of a quadratic. At 1 it is on the edge of diverging, and noise in the gradients
    drives it over; large rates also flatten the loss where they lead, which raises them further."""
    least_rate: float = 1e-4
    """Rates below are raised to this, before the schedule."""
    most_rate: float = 10.0
    """Rates above are cut to this, before the schedule."""
    most_momentum: float = 0.95
    """Momenta above are cut to this."""

    def __post_init__(self) -> None:
        self._check("every_samples", self.every_samples is None or self.every_samples >= 1, "at least 1 sample")
        self._check("steps", self.steps >= 2, "at least 2")
        self._check("noise_cut", 0 < self.noise_cut < 1, "a share in (0, 1)")
        self._check("smoothing", 0 <= self.smoothing < 1, "a share in [0, 1)")
        self._check("share", 0 < self.share <= 1, "a share in (0, 1]")
        self._check("least_rate", self.least_rate > 0, "a number above 0")
        self._check("most_rate", self.most_rate >= self.least_rate, f"at least least_rate, {self.least_rate}")
        self._check("most_momentum", 0 <= self.most_momentum < 1, "a number in [0, 1)")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            flag = f"--curvature-rate.{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected {expected}, got {getattr(self, name)}")
