"""What a user says about the dense optimizer; free of torch so that the command line stays quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

DenseOptimizerName = Literal["lamb", "sgd", "adam", "adamw", "adagrad"]

# Which optimizer reads which of the options that may be left at None.
_READERS: dict[str, tuple[DenseOptimizerName, ...]] = {
    "betas": ("lamb", "adam", "adamw"),
    "eps": ("lamb", "adam", "adamw", "adagrad"),
    "momentum": ("sgd",),
    "max_grad_norm": ("lamb",),
}


@dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """The optimizer of everything but the tables.

    Raises:
        ValueError: Naming the flag, for a number out of range or an option that the chosen optimizer does not read.
    """

    name: DenseOptimizerName = "lamb"
    """Our LAMB, or torch's optimizer of that name."""
    learning_rate: float = 0.005
    """Rate before the schedule; for lamb a step's length relative to the layer's norm (0.001 to 0.02)."""
    weight_decay: float = 0.0
    """Decay of matrices (biases and norm scales have none); inside the direction for lamb, decoupled for adamw."""
    betas: tuple[float, float] | None = None
    """Decay per step of the two moments (lamb, adam, adamw); 0.9 and 0.999 if not given."""
    eps: float | None = None
    """Added to the denominator (lamb 1e-6, adam and adamw 1e-8, adagrad 1e-10 if not given)."""
    momentum: float | None = None
    """Momentum of sgd; none if not given."""
    max_grad_norm: float | None = None
    """Scale all gradients so that their global norm is at most this before lamb reads them; off if not given."""

    def __post_init__(self) -> None:
        names = get_args(DenseOptimizerName)
        self._check("name", self.name in names, f"one of {', '.join(names)}")
        self._check("learning_rate", 0.0 < self.learning_rate < math.inf, "a number > 0")
        self._check("weight_decay", 0.0 <= self.weight_decay < math.inf, "a number >= 0")
        for option, readers in _READERS.items():
            given = getattr(self, option) is not None
            self._check(option, not given or self.name in readers, f"no value with --dense.name {self.name}")
        if self.betas is not None:
            fits = len(self.betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.betas)
            self._check("betas", fits, "two numbers in [0, 1)")
        if self.eps is not None:
            self._check("eps", 0.0 < self.eps < math.inf, "a number > 0")
        if self.momentum is not None:
            self._check("momentum", 0.0 <= self.momentum < 1.0, "a number in [0, 1)")
        if self.max_grad_norm is not None:
            self._check("max_grad_norm", 0.0 < self.max_grad_norm < math.inf, "a number > 0")

    def _check(self, option: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"--dense.{option.replace('_', '-')}: expected {expected}, got {getattr(self, option)}")
