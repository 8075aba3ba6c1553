"""Searches an arm's settings by AUC on validation rows: a seeded random search, first wide, then around the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Point = Mapping[str, float]
Space = Mapping[str, tuple[float, float]]
"""Least and greatest value by name; all are searched by their logarithms."""

REPEAT_BEST = 0.7  # chance that a narrow trial begins at the best point so far, and not at the second best
KEEP = 0.4  # chance that it leaves a coordinate as it is
WIDTH, LAST_WIDTH = 0.3, 0.12  # standard deviation of its step, as a share of the space, in the first and last trial


@dataclass(frozen=True)
class Trial:
    """A point that was tried, and its AUC on the validation rows."""

    point: Point
    auc: float


def search(measure: Callable[[Point], float], space: Space, starts: Sequence[Point], trials: int) -> list[Trial]:
    """Try `trials` points, and return them in order of time.

    The starts come first, then some drawn from the whole space, then steps away from the best so far. What is tried
    depends on what was measured alone, so that a search with remembered measurements goes on where it stopped.
    """
    done: list[Trial] = []
    for number in range(trials):
        if number < len(starts):
            point = dict(starts[number])
        else:
            point = _draw(space, done, number - len(starts), trials)
        done.append(Trial(point, measure(point)))
    return done


def _draw(space: Space, done: Sequence[Trial], number: int, trials: int) -> dict[str, float]:
    rng = np.random.default_rng([len(done), trials])
    places = {name: rng.random() for name in space}
    if number >= max(2, len(space) // 2):
        ranked = sorted(done, key=lambda trial: -trial.auc)
        centre = ranked[0 if rng.random() < REPEAT_BEST else min(1, len(ranked) - 1)].point
        width = WIDTH + (LAST_WIDTH - WIDTH) * len(done) / trials
        for name, (least, greatest) in space.items():
            step = width * rng.standard_normal() * (rng.random() >= KEEP)
            places[name] = math.log(centre[name] / least) / math.log(greatest / least) + step
    return {
        name: float(f"{least * (greatest / least) ** min(1.0, max(0.0, places[name])):.3g}")
        for name, (least, greatest) in space.items()
    }


def on_the_edge(best: Trial, space: Space, *, within: float = 0.05) -> list[str]:
    """Name the settings of a trial that lie at an end of the space, or within a share of its length from one."""
    places = {
        name: math.log(best.point[name] / least) / math.log(greatest / least)
        for name, (least, greatest) in space.items()
    }
    return [name for name, place in places.items() if not within < place < 1 - within]
