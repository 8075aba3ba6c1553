"""Learning rates that follow the valid split: what is done, and decided, when its metric no longer gets better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dlrm.optim.formulas import Formula
from dlrm.optim.schedule_text import parse_formula


@dataclass(frozen=True, kw_only=True)
class PlateauConfig:
    """What follows when `--evaluation.metric` is no better for several evaluations in a row.

    Raises:
        ValueError: Naming the flag, for a number out of range, or formulas without `change`.
    """

    policy: Literal["off", "reduce", "change"] = "off"
    """reduce: multiply the learning rate by `factor`. change: go on to another one of `shapes`."""
    patience: int = 2
    """Evaluations in a row without a gain that make a plateau."""
    cooldown: int = 0
    """Evaluations after a change that do not count."""
    least_gain: float = 0.0
    """A metric is better only if it is so by more than this."""
    factor: float = 0.5
    """reduce: what the rate is multiplied by."""
    floor: float = 0.01
    """reduce: the product of all such factors is at least this."""
    shapes: tuple[str, ...] = ()
    """change: formulas as in `--dense-schedule.shape`, from the calmest to the most aggressive one."""
    start: int = 0
    """change: the one that a run begins with, counted from 0."""
    bold_until: float = 0.8
    """change: before this share of the run a plateau leads to the next bolder shape, after it to the next calmer."""
    groups: Literal["all", "dense", "tables"] = "all"
    """Whose rates follow."""

    def __post_init__(self) -> None:
        self._check("patience", self.patience >= 1, "at least 1")
        self._check("cooldown", self.cooldown >= 0, "at least 0")
        self._check("least_gain", 0.0 <= self.least_gain < math.inf, "a number >= 0")
        self._check("factor", 0.0 < self.factor < 1.0, "a number between 0 and 1")
        self._check("floor", 0.0 <= self.floor <= 1.0, "a number from 0 to 1")
        self._check("bold_until", 0.0 <= self.bold_until <= 1.0, "a share from 0 to 1")
        fits = len(self.shapes) > 1 if self.policy == "change" else not self.shapes
        self._check("shapes", fits, "two formulas or more with --plateau.policy change, and none without it")
        self._check("start", 0 <= self.start < max(1, len(self.shapes)), "the number of one of the shapes, from 0")
        try:
            self.formulas()
        except ValueError as error:
            raise ValueError(f"--plateau.shapes: {error}") from None

    def formulas(self) -> tuple[Formula, ...]:
        """Return the shapes, parsed."""
        return tuple(map(parse_formula, self.shapes))

    def _check(self, option: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"--plateau.{option.replace('_', '-')}: expected {expected}, got {getattr(self, option)}")


def find_plateau_doubt(config: PlateauConfig, samples: int, every_samples: int) -> str | None:
    """Say so where there are too few evaluations for a plateau to be followed.

    Args:
        config: of the plateau.
        samples: of the run.
        every_samples: between evaluations.
    """
    # The first one is there to compare with, and nothing follows the one at the end.
    count, needed = (samples - 1) // every_samples, config.patience + 1
    if config.policy == "off" or count >= needed:
        return None
    return (
        f"--plateau.policy {config.policy} cannot do anything in this run: it takes {needed} evaluations before the "
        f"end, and there are {count}; give --evaluation.every-samples of at most {max(1, (samples - 1) // needed):,}"
    )


class PlateauDetector:
    """Says after each evaluation whether the metric has come to a plateau.

    Args:
        patience: evaluations in a row without a gain that make one.
        cooldown: evaluations after one that do not count.
        least_gain: by which a value must be better.
        higher_is_better: of the metric.
    """

    def __init__(self, *, patience: int, cooldown: int, least_gain: float, higher_is_better: bool) -> None:
        self.patience, self.cooldown, self.least_gain = patience, cooldown, least_gain
        self._sign = 1.0 if higher_is_better else -1.0
        self._best: float | None = None
        self._without_gain, self._cooling = 0, 0

    def note(self, value: float) -> bool:
        """Take a value, NaN where it is not defined, and return whether there is a plateau now."""
        if math.isnan(value):
            return False
        gained = self._best is None or self._sign * (value - self._best) > self.least_gain
        if gained:
            self._best = value
        if self._cooling:
            self._cooling, self._without_gain = self._cooling - 1, 0
            return False
        self._without_gain = 0 if gained else self._without_gain + 1
        if self._without_gain < self.patience:
            return False
        self._without_gain, self._cooling = 0, self.cooldown
        return True

    def state(self) -> dict[str, float | int | None]:
        """Return what a resumed run needs."""
        return {"best": self._best, "without_gain": self._without_gain, "cooling": self._cooling}

    def load_state(self, state: dict[str, float | int | None]) -> None:
        """Go on from what `state` returned."""
        self._best = state["best"]
        self._without_gain, self._cooling = int(state["without_gain"] or 0), int(state["cooling"] or 0)
