"""What a study may change of a configuration, and within which range; where a range ends by nature is said too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dlrm.config import RunConfig

# A best value this near an end of the range, as a share of it, could as well lie beyond.
EDGE = 0.05


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """The range of one hyperparameter.

    Attributes:
        name: of the hyperparameter; the settings that it sets, joined by `+`.
        low: the least value.
        high: the greatest.
        log: draw its logarithm evenly.
        ends: `low`, `high` or both, where nothing lies beyond, or nothing that makes a difference.
    """

    name: str
    low: float
    high: float
    log: bool = True
    ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"--space {self.name}: expected LOW < HIGH, got {self.low:g}:{self.high:g}")
        if self.log and not self.low > 0:
            raise ValueError(f"--space {self.name}: expected LOW > 0 for a range by its logarithm, got {self.low:g}")

    def at(self, share: float) -> float:
        """Return the value that so large a share of the range lies below."""
        return self._unscale(self._scale(self.low) + share * (self._scale(self.high) - self._scale(self.low)))

    def clip(self, value: float) -> float:
        """Return the nearest value within the range."""
        return min(max(value, self.low), self.high)

    def edge(self, value: float) -> str:
        """Return which end of the range a value lies at: `low`, `high` or ""."""
        place = (self._scale(value) - self._scale(self.low)) / (self._scale(self.high) - self._scale(self.low))
        at = "low" if place < EDGE else "high" if place > 1 - EDGE else ""
        return "" if at in self.ends else at

    def extended(self, end: str) -> Dimension:
        """Return a range that reaches half as far again beyond an end; an even one not below 0, if it began above."""
        width = (self._scale(self.high) - self._scale(self.low)) / 2
        if end == "high":
            return replace(self, high=self._unscale(self._scale(self.high) + width))
        low = self._unscale(self._scale(self.low) - width)
        return replace(self, low=max(low, 0.0) if self.low >= 0 else low)

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _unscale(self, place: float) -> float:
        return math.exp(place) if self.log else place


Space = tuple[Dimension, ...]


def find_edges(space: Space, parameters: Mapping[str, float]) -> dict[str, str]:
    """Return which hyperparameters lie at which end of their range."""
    edges = {dimension.name: dimension.edge(parameters[dimension.name]) for dimension in space}
    return {name: edge for name, edge in edges.items() if edge}


def extend(space: Space, edges: Mapping[str, str]) -> Space:
    """Return the space with longer ranges where `edges` says so."""
    return tuple(d.extended(edges[d.name]) if d.name in edges else d for d in space)


def parse_space(texts: Sequence[str]) -> Space:
    """Read ranges such as `dense.learning_rate=1e-4:1e-1`, `dense.momentum=0:0.95` or `a.b+c.d=1:2:linear`.

    A range above 0 is drawn by its logarithm unless `:linear` follows; nothing is taken to lie below one from 0.

    Raises:
        ValueError: a text has another form.
    """
    space = []
    for text in texts:
        name, _, spread = text.partition("=")
        parts = spread.split(":")
        try:
            low, high = float(parts[0]), float(parts[1])
        except (ValueError, IndexError):
            low = high = math.nan
        if not name or math.isnan(low + high) or parts[2:] not in ([], ["linear"], ["log"]):
            raise ValueError(f"--space: expected SETTING=LOW:HIGH or SETTING=LOW:HIGH:linear, got '{text}'")
        log = low > 0 if not parts[2:] else parts[2] == "log"
        space.append(Dimension(name=name, low=low, high=high, log=log, ends=("low",) if low == 0 else ()))
    if len({dimension.name for dimension in space}) < len(space):
        raise ValueError(f"--space: expected each setting once, got {' '.join(texts)}")
    return tuple(space)


def apply_parameters(config: RunConfig, parameters: Mapping[str, float]) -> RunConfig:
    """Return a configuration with hyperparameters in place, see `Dimension.name`.

    Raises:
        ValueError: there is no such setting, or it does not accept the value.
    """
    for name, value in parameters.items():
        for path in name.split("+"):
            config = replace_setting(config, path, value)
    return config


def read_setting(config: RunConfig, path: str) -> float | None:
    """Return a configuration's number.

    Raises:
        ValueError: there is no such setting, or it is no number.
    """
    return _walk(config, path.split("."))[1]


def replace_setting(config: RunConfig, path: str, value: float) -> RunConfig:
    """Return a configuration with one number changed, rounded where it counts something.

    Args:
        config: of a run.
        path: of the setting, as `dense.learning_rate`.
        value: its new one.

    Raises:
        ValueError: there is no such setting, it is no number, or the value is not accepted.
    """
    names = path.split(".")
    parts, old = _walk(config, names)
    new: Any = round(value) if isinstance(old, int) else value
    for part, name in zip(reversed(parts), reversed(names), strict=True):
        new = replace(part, **{name: new})
    changed: RunConfig = new
    return changed


def _walk(config: RunConfig, names: Sequence[str]) -> tuple[list[Any], float | None]:
    """Return the groups that a setting lies in, from the outermost to the innermost, and its value."""
    parts: list[Any] = [config]
    for name in names:
        if not hasattr(parts[-1], name):
            raise ValueError(f"--space: expected a setting such as dense.learning_rate, got '{'.'.join(names)}'")
        parts.append(getattr(parts[-1], name))
    old = parts.pop()
    if isinstance(old, bool) or not isinstance(old, int | float | None):
        raise ValueError(f"--space: expected a setting that is a number, got '{'.'.join(names)}', which is {old!r}")
    return parts, old
