"""What a user says about adversarial training; free of torch so that the command line stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Trains on every sample twice: as it is, and with its pooled rows moved against it.

    Raises:
        ValueError: Naming the flag, for a number out of range.
    """

    eps: float = 0.0
    """Length of the move of a sample's pooled rows; 0 trains as usual."""
    per: Literal["sample", "feature"] = "sample"
    """What is moved by that length: all pooled rows of a sample together, or those of each feature."""
    staleness: Literal[0, 1] = 0
    """1 finds the move one step ahead, with the weights before the update, so that it may run beside that step."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"--adversarial.eps: expected a number >= 0, got {self.eps}")
        if self.staleness not in (0, 1):
            raise ValueError(f"--adversarial.staleness: expected 0 or 1, got {self.staleness}")
