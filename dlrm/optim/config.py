"""What a user says about the dense optimizer; free of torch so that the command line stays quick."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

DenseOptimizerName = Literal["lamb", "lars", "factored", "sgd", "adam", "adamw", "adagrad"]

# Which optimizer reads which of the options that need not be given.
_READERS: dict[str, tuple[DenseOptimizerName, ...]] = {
    "betas": ("lamb", "adam", "adamw"),
    "eps": ("lamb", "lars", "adam", "adamw", "adagrad"),
    "momentum": ("lars", "factored", "sgd"),
    "max_grad_norm": ("lamb",),
    "norm_bounds": ("lamb",),
    "trust_clip": ("lamb",),
    "moment_type": ("lamb", "factored"),
    "trust_coefficient": ("lars",),
    "variant": ("lars",),
}

OPTIONS = tuple(_READERS)
"""Options of single optimizers, each None or False unless it is given."""

_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (lambda rate: 0.0 < rate < math.inf, "a number > 0"),
    "weight_decay": (lambda decay: 0.0 <= decay < math.inf, "a number >= 0"),
    "betas": (lambda betas: len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas), "two numbers in [0, 1)"),
    "eps": (lambda eps: 0.0 < eps < math.inf, "a number > 0"),
    "momentum": (lambda momentum: 0.0 <= momentum < 1.0, "a number in [0, 1)"),
    "max_grad_norm": (lambda norm: 0.0 < norm < math.inf, "a number > 0"),
    "norm_bounds": (lambda bounds: 0.0 <= bounds[0] <= bounds[1] < math.inf, "two numbers, 0 <= least <= most"),
    "moment_type": (lambda name: name in ("fp32", "bf16"), "fp32 or bf16"),
    "trust_coefficient": (lambda coefficient: 0.0 < coefficient < math.inf, "a number > 0"),
    "variant": (lambda name: name in ("original", "paper_lamb"), "original or paper_lamb"),
}


@dataclass(frozen=True, kw_only=True)
class DenseOptimizerConfig:
    """The optimizer of everything but the tables.

    Raises:
        ValueError: Naming the flag, for a number out of range or an option that the chosen optimizer does not read.
    """

    name: DenseOptimizerName = "lamb"
    """Our LAMB, LARS or factored Adam (Adafactor's memory, Adam's rates), or torch's optimizer of that name."""
    learning_rate: float = 0.005
    """Rate before the schedule; for lamb a step's length relative to the layer's norm (0.001 to 0.02)."""
    weight_decay: float = 0.0
    """Decay of matrices (biases and norm scales have none); inside the direction for lamb, decoupled for adamw and
    factored."""
    betas: tuple[float, float] | None = None
    """Decay per step of the two moments (lamb, adam, adamw); 0.9 and 0.999 if not given."""
    eps: float | None = None
    """Added to the denominator (lamb 1e-6, adam and adamw 1e-8, adagrad 1e-10, lars 0 if not given)."""
    momentum: float | None = None
    """Momentum of sgd (none if not given), lars and factored (0.9)."""
    max_grad_norm: float | None = None
    """Scale all gradients so that their global norm is at most this before lamb reads them; off if not given."""
    norm_bounds: tuple[float, float] | None = None
    """Keep the norm of the weights that lamb's ratio is made of between these two; as it is if not given."""
    trust_clip: bool = False
    """Bound lamb's ratio by 1."""
    moment_type: Literal["fp32", "bf16"] | None = None
    """How lamb (fp32 if not given) and factored (bf16) store the first moment."""
    trust_coefficient: float | None = None
    """Length of a step of lars relative to the layer's norm, times the learning rate; 0.001 if not given."""
    variant: Literal["original", "paper_lamb"] | None = None
    """lars: as it was published (if not given), or as in LAMB's paper, where learning rates are lamb's."""

    def __post_init__(self) -> None:
        _check(self, "--dense")
        for option, readers in _READERS.items():
            if is_given(getattr(self, option)) and self.name not in readers:
                raise _unexpected(self, "--dense", option, f"no value with --dense.name {self.name}")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What is different for the head, the matrix of the layer that gives the logit: the top MLP's last one.

    Raises:
        ValueError: Naming the flag, for a number out of range.
    """

    name: DenseOptimizerName | None = None
    """Its optimizer; None is that of the dense part with all its options, another one has its own defaults."""
    learning_rate: float | None = None
    """Rate before the schedules; None is that of the dense part."""
    weight_decay: float | None = None
    """Decay; None is that of the dense part."""

    def __post_init__(self) -> None:
        _check(self, "--head")

    def resolve(self, dense: DenseOptimizerConfig) -> DenseOptimizerConfig:
        """Return the whole configuration of the head's optimizer, given that of the dense part.

        Raises:
            ValueError: It has an optimizer of its own and no rate, as the dense part's would mean something else.
        """
        own = {name: value for name, value in vars(self).items() if value is not None}
        if own.get("name", dense.name) == dense.name:
            return replace(dense, **own)
        if self.learning_rate is None:
            raise ValueError(f"--head.learning-rate: expected a number beside --head.name {self.name}, got none")
        return DenseOptimizerConfig(**{"weight_decay": dense.weight_decay, **own})


def is_given(value: Any) -> bool:
    """Say whether an option has another value than none."""
    return value is not None and value is not False


def _check(config: Any, flag: str) -> None:
    names = get_args(DenseOptimizerName)
    if config.name is not None and config.name not in names:
        raise _unexpected(config, flag, "name", f"one of {', '.join(names)}")
    for option, (fits, expected) in _EXPECTED.items():
        value = getattr(config, option, None)
        if value is not None and not fits(value):
            raise _unexpected(config, flag, option, expected)


def _unexpected(config: Any, flag: str, option: str, expected: str) -> ValueError:
    return ValueError(f"{flag}.{option.replace('_', '-')}: expected {expected}, got {getattr(config, option)}")


AS_DENSE = HeadConfig()
"""No difference."""
