"""What a user says about measuring the gradients' noise; free of torch so that the command line stays quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NoiseScaleConfig:
    """How the gradient noise scale is followed through a run; measuring has no part in what is learned.

    Raises:
        ValueError: Naming the flag, for a number out of range.
    """

    every_steps: int = 50
    """Measure one step in so many; 0 never. A measured step takes up to twice as long."""
    decay: float = 0.95
    """Of the averages over measured steps."""
    preconditioned: bool = False
    """Measure the dense gradients as adam, adamw, adagrad and lamb divide them, by the root of second moments."""

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise ValueError(f"--noise-scale.every-steps: expected at least 0, got {self.every_steps}")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"--noise-scale.decay: expected a number in [0, 1), got {self.decay}")
