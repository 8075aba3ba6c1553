"""What a user says about tables: how rows start, are stored and updated; free of torch, as all configuration is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

RowOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "lamb", "partial_lamb", "cowclip"]
Trust = Literal["row", "touched", "table"]
L2Mode = Literal["dense", "lazy"]

_WITH_MOMENTS: tuple[RowOptimizerName, ...] = ("adam", "lamb", "partial_lamb", "cowclip")
# Which optimizer reads which of the options that need not be given.
_READERS: dict[str, tuple[RowOptimizerName, ...]] = {
    "eps": ("rowwise_adagrad", "adagrad", *_WITH_MOMENTS),
    "betas": _WITH_MOMENTS,
    "weight_decay": ("rowwise_adagrad", "adagrad", "sgd", "adam", "lamb", "partial_lamb"),
    "trust": ("lamb", "partial_lamb"),
    "clip": ("cowclip",),
    "zeta": ("cowclip",),
    "l2": ("cowclip",),
    "l2_mode": ("cowclip",),
}

_NOT_NEGATIVE: tuple[Callable[[Any], bool], str] = (lambda number: 0.0 <= number < math.inf, "a number >= 0")
_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda number: 0.0 < number < math.inf, "a number > 0")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "optimizer": (lambda name: name in get_args(RowOptimizerName), f"one of {', '.join(get_args(RowOptimizerName))}"),
    "learning_rate": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "betas": (lambda betas: len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas), "two numbers in [0, 1)"),
    "weight_decay": _NOT_NEGATIVE,
    "trust": (lambda trust: trust in get_args(Trust), f"one of {', '.join(get_args(Trust))}"),
    "clip": _POSITIVE,
    "zeta": _POSITIVE,
    "l2": _NOT_NEGATIVE,
    "l2_mode": (lambda mode: mode in get_args(L2Mode), f"one of {', '.join(get_args(L2Mode))}"),
    "init_scale": _NOT_NEGATIVE,
}


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """What all tables of a recipe have in common; the Python API sets each table apart.

    Raises:
        ValueError: Naming the flag, for a number out of range or an option that the chosen optimizer does not read.
    """

    optimizer: RowOptimizerName = "rowwise_adagrad"
    """How rows are updated, inside backward; partial_lamb keeps one second moment per row, cowclip is Adam on gradients
    that are clipped by the row's length."""
    learning_rate: float = 0.05
    """Peak learning rate of the rows; `--tables-schedule` scales it. Of lamb it is relative to a row's length."""
    rates: tuple[str, ...] = ()
    """Tables with a rate of their own, as NAME=FACTOR ..., which multiplies that of the others or of small tables."""
    eps: float | None = None
    """All but sgd: added to the root of the squared gradients; None means 1e-8, or 1e-6 of lamb. Where it is small
    beside them, a row's first step has the length of the learning rate however little it has learned from; where it is
    large, rows move in proportion to what they have learned from, which rare ids need. Gradients are those of the mean
    over the batch: double the batch, halve eps."""
    betas: tuple[float, float] | None = None
    """adam, lamb and cowclip: decay per update of the two moments; 0.9 and 0.999 if not given."""
    trust: Trust | None = None
    """lamb: the ratio of norms is that of each row (if not given), of all rows that the batch touches, or of the whole
    table, all of whose rows then move in each step: for small tables."""
    weight_decay: float = 0.0
    """Decay, of the rows that a batch touches only: L2, or of adam decoupled, or of lamb within the direction."""
    clip: float | None = None
    """cowclip: longest gradient of one occurrence of an id, relative to its row; 1 if not given."""
    zeta: float | None = None
    """cowclip: rows shorter than this per root of a number are clipped as if they were so long; 1e-5 if not given."""
    l2: float | None = None
    """cowclip: weight in the loss of the sum of all rows' squares; 0 if not given. Published: in proportion to the
    batch size."""
    l2_mode: L2Mode | None = None
    """cowclip: dense (if not given) moves every row in every step, as published; lazy only those of the batch, and adds
    up l2 for the steps in which a row was away."""
    pooling: Literal["sum", "mean"] = "sum"
    """How the rows of one bag become one vector."""
    init_scale: float | None = None
    """Rows start uniform in [-init_scale, init_scale); None means 1 / sqrt(num_rows) of each table."""
    kernel: Literal["auto", "numba", "fbgemm"] = "auto"
    """Whose kernels: auto is numba on a CPU and fbgemm on a GPU."""
    row_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How rows are stored; 16 bits are rounded at random, so that small updates are not lost."""
    memory: Literal["device", "uvm", "uvm_caching"] = "device"
    """Where a GPU's rows lie: its own memory, the host's, or the host's with a cache in its own."""

    def __post_init__(self) -> None:
        _check_numbers(self, "--tables")
        _check_readers(self, self.optimizer, "--tables")
        parse_rates(self.rates)


@dataclass(frozen=True, kw_only=True)
class SmallTablesConfig:
    """Where small tables are updated otherwise than the others; each option that is None is as with the others.

    A row of a small table occurs in most batches, as a dense weight does. With an optimizer of their own they take
    over nothing of what the others' optimizer is told but the weight decay.

    Raises:
        ValueError: Naming the flag, for a number out of range, or an option where no table is small.
    """

    below_rows: int = 0
    """Tables with fewer rows than this are small; 0 means that none is."""
    optimizer: RowOptimizerName | None = None
    """As --tables.optimizer."""
    learning_rate: float | None = None
    """As --tables.learning-rate."""
    eps: float | None = None
    """As --tables.eps."""
    betas: tuple[float, float] | None = None
    """As --tables.betas."""
    trust: Trust | None = None
    """As --tables.trust."""
    weight_decay: float | None = None
    """As --tables.weight-decay."""
    clip: float | None = None
    """As --tables.clip."""
    zeta: float | None = None
    """As --tables.zeta."""
    l2: float | None = None
    """As --tables.l2."""
    l2_mode: L2Mode | None = None
    """As --tables.l2-mode."""
    init_scale: float | None = None
    """As --tables.init-scale."""

    def __post_init__(self) -> None:
        if self.below_rows < 0:
            raise ValueError(f"--small-tables.below-rows: expected at least 0, got {self.below_rows}")
        _check_numbers(self, "--small-tables")
        if not self.below_rows and (given := self._given()):
            flag = _flag("--small-tables", next(iter(given)))
            raise ValueError(f"{flag}: expected --small-tables.below-rows above 0 beside it, got 0")

    def resolve(self, tables: TablesConfig) -> TablesConfig:
        """Return the whole configuration of small tables, given that of the others.

        Raises:
            ValueError: They have an optimizer of their own and no rate, or an option which it does not read.
        """
        own = self._given()
        optimizer = self.optimizer or tables.optimizer
        _check_readers(self, optimizer, "--small-tables")
        if optimizer == tables.optimizer:
            return replace(tables, **own)
        if self.learning_rate is None:
            raise ValueError(
                f"--small-tables.learning-rate: expected a number beside the optimizer {optimizer}, got none"
            )
        dropped = {option: None for option in _READERS if option != "weight_decay"}
        if optimizer not in _READERS["weight_decay"]:
            dropped |= {"weight_decay": 0.0}  # type: ignore[dict-item]
        return replace(tables, **(dropped | own))

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None and name != "below_rows"}


def parse_rates(texts: tuple[str, ...]) -> dict[str, float]:
    """Return the factors of tables' learning rates, written as NAME=FACTOR.

    Raises:
        ValueError: Naming the flag, for one that is written otherwise or is not above 0.
    """
    factors = {}
    for text in texts:
        name, _, factor = text.rpartition("=")
        try:
            factors[name] = float(factor)
        except ValueError:
            factors[name] = math.nan
        if not name or not 0.0 < factors[name] < math.inf:
            raise ValueError(f"--tables.rates: expected NAME=FACTOR with a factor above 0, got {text}")
    return factors


def _check_numbers(config: Any, flag: str) -> None:
    for option, (fits, expected) in _EXPECTED.items():
        value = getattr(config, option)
        if value is not None and not fits(value):
            raise ValueError(f"{_flag(flag, option)}: expected {expected}, got {value}")


def _check_readers(config: Any, optimizer: str, flag: str) -> None:
    for option, readers in _READERS.items():
        value = getattr(config, option)
        if value is not None and optimizer not in readers and not (option == "weight_decay" and value == 0.0):
            raise ValueError(f"{_flag(flag, option)}: expected no value with {flag}.optimizer {optimizer}, got {value}")


def _flag(flag: str, option: str) -> str:
    return f"{flag}.{option.replace('_', '-')}"
