"""What a study of curvature computes: trials that are stored one by one, around each solution and between two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.curvature.landscape import draw_direction, interpolate
from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.sample import Sample
from dlrm.analysis.curvature.sampled_model import SampledModel, Solution
from dlrm.analysis.curvature.sharpness import measure_sharpness
from dlrm.analysis.curvature.spectrum import find_extremes, probe_spectrum

Trial = tuple[str, Callable[[], dict[str, Any]]]
LINE_ENDS = -1.0, 2.0
LINE_SPLITS = "train", "valid"
PERPENDICULAR = 1_000  # added to the seed of the landscape's second direction


@dataclass(frozen=True, kw_only=True, eq=False)
class Terrain:
    """Solutions and the sample on which their losses are compared.

    Attributes:
        config: of the study.
        model: takes one solution or another.
        solutions: one of each run.
        sample: of the train split, and of those that the line is walked on.
    """

    config: CurvatureConfig
    model: SampledModel
    solutions: Sequence[Solution]
    sample: Sample

    def trials(self) -> Iterator[Trial]:
        """Give every trial: its name, and what computes it."""
        for number in range(1, len(self.solutions) + 1):
            yield from self._around(number)
        if len(self.solutions) == 2 and self.config.points:
            for split in LINE_SPLITS:
                if split in self.sample.parts:
                    yield f"line/{split}", partial(self._line, split)

    def _around(self, number: int) -> Iterator[Trial]:
        config = self.config
        yield f"{number}/extremes", partial(self._extremes, number)
        for probe in range(config.probes):
            yield name_probe(number, probe), partial(self._probe, number, probe)
        for size in config.sharpness:
            yield name_sharpness(number, size), partial(self._sharpness, number, size)
        if config.points:
            yield f"{number}/curve", partial(self._curve, number)
        for row in range(config.grid):
            yield name_row(number, row), partial(self._row, number, row)

    def _objective(self, number: int, weights: str) -> tuple[Objective, Tensor]:
        self.model.load(self.solutions[number - 1])
        objective = Objective(self.model, self.sample.parts["train"], names=self.model.names(weights))
        return objective, objective.weights()

    def _extremes(self, number: int) -> dict[str, Any]:
        objective, at = self._objective(number, self.config.weights)
        ritz = find_extremes(partial(objective.hessian_product, at), at, steps=self.config.steps, seed=self.config.seed)
        return {
            "smallest": ritz.smallest[0],
            "smallest_error": ritz.smallest[1],
            "largest": ritz.largest[0],
            "largest_error": ritz.largest[1],
            "products": len(ritz.values),
            "num_weights": objective.num_weights,
            "norm": float(at.norm()),
            "loss": objective.value(at),
        }

    def _probe(self, number: int, probe: int) -> dict[str, Any]:
        objective, at = self._objective(number, self.config.weights)
        seed = self.config.seed + 1 + probe
        steps = max(2, self.config.steps // 2)
        ritz = probe_spectrum(partial(objective.hessian_product, at), at, steps=steps, seed=seed)
        return {"values": ritz.values.tolist(), "weights": ritz.weights.tolist()}

    def _sharpness(self, number: int, size: float) -> dict[str, Any]:
        objective, at = self._objective(number, self.config.weights)
        found = measure_sharpness(objective, at, reach=size, subspace=self.config.subspace, seed=self.config.seed)
        return {"percent": found.percent, "highest": found.highest, "evaluations": found.evaluations}

    def _curve(self, number: int) -> dict[str, Any]:
        objective, at = self._objective(number, "all")
        direction = self._direction(objective, at, self.config.seed)
        steps = spread(self.config.points, self.config.reach)
        return {"losses": [objective.value(at + step * direction) for step in steps]}

    def _row(self, number: int, row: int) -> dict[str, Any]:
        """Compute one row of the landscape, whose first direction is the curve's."""
        objective, at = self._objective(number, "all")
        steps = spread(self.config.grid, self.config.reach)
        start = at + steps[row] * self._direction(objective, at, self.config.seed + PERPENDICULAR)
        direction = self._direction(objective, at, self.config.seed)
        return {"losses": [objective.value(start + step * direction) for step in steps]}

    def _line(self, split: str) -> dict[str, Any]:
        objective = Objective(self.model, self.sample.parts[split])
        (first, second), losses = self.solutions, []
        for share in line_shares(self.config.points):
            self.model.load(interpolate(first, second, share))
            losses.append(objective.value(objective.weights()))
        return {"losses": losses}

    def _direction(self, objective: Objective, at: Tensor, seed: int) -> Tensor:
        drawn = draw_direction(objective.split(at), seed)
        return torch.cat([drawn[name].flatten() for name in objective.shapes])


def spread(points: int, reach: float) -> list[float]:
    """Return steps from -reach to reach; the solution, 0, is one of them if their number is odd."""
    steps: list[float] = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    return steps


def line_shares(points: int) -> list[float]:
    """Return how far along the line from the first to the second solution each point lies; both are among them."""
    shares: list[float] = torch.linspace(*LINE_ENDS, points, dtype=torch.float64).tolist()
    return sorted({*shares, 0.0, 1.0})


def name_probe(number: int, probe: int) -> str:
    """Name the trial of one probe of a run's spectrum."""
    return f"{number}/density/probe-{probe}"


def name_sharpness(number: int, size: float) -> str:
    """Name the trial of a run's sharpness in a box of a size."""
    return f"{number}/sharpness/{size:g}"


def name_row(number: int, row: int) -> str:
    """Name the trial of one row of a run's landscape."""
    return f"{number}/landscape/row-{row}"
