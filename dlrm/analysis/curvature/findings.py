"""The numbers that a study of curvature comes down to, read from its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dlrm.analysis.curvature.flags import CurvatureConfig
from dlrm.analysis.curvature.lanczos import RitzValues
from dlrm.analysis.curvature.spectrum import estimate_trace, share_below
from dlrm.analysis.curvature.trials import line_shares, name_probe, name_row, name_sharpness

Records = Mapping[str, Mapping[str, Any]]
NEGATIVE = 1e-3  # eigenvalues below minus this share of the largest count as negative


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One run's.

    Attributes:
        label: `run 1` or `run 2`, or `this run` where there is one alone.
        batch_size: it was trained with; None if its configuration does not say.
        loss: on the sample.
        num_weights: of the Hessian.
        norm: of these weights.
        largest: eigenvalue, and how far off it may be.
        smallest: likewise.
        products: with the Hessian that these took.
        probes: of the spectrum; there may be none.
        trace: and its standard error; None without probes.
        share_negative: of the eigenvalues; None without probes.
        sharpness: percent, by the size of the box.
        curve: losses along a random direction.
        landscape: losses over two, row by row.
    """

    label: str
    batch_size: int | None
    loss: float
    num_weights: int
    norm: float
    largest: tuple[float, float]
    smallest: tuple[float, float]
    products: int
    probes: list[RitzValues]
    trace: tuple[float, float] | None
    share_negative: float | None
    sharpness: dict[float, float]
    curve: list[float | None]
    landscape: list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Losses between two solutions, and beyond.

    Attributes:
        shares: of the second solution; 0 is the first.
        losses: at each, by split.
    """

    shares: list[float]
    losses: dict[str, list[float | None]]

    def ends(self, split: str) -> tuple[float | None, float | None]:
        """Return the losses of both solutions."""
        first, second = (self.losses[split][self.shares.index(share)] for share in (0.0, 1.0))
        return first, second

    def barrier(self, split: str) -> float | None:
        """Return how far the loss between the two rises above the straight line from one's to the other's, 0 or more.

        None where the loss of one of them is not finite; infinite where one between them is not.
        """
        first, last = self.ends(split)
        if first is None or last is None:
            return None
        known = zip(self.shares, self.losses[split], strict=True)
        between = [(share, loss) for share, loss in known if 0 <= share <= 1]
        return max(math.inf if loss is None else loss - (first + share * (last - first)) for share, loss in between)


def read_finding(number: int, config: CurvatureConfig, run: Mapping[str, Any], records: Records) -> Finding:
    """Gather what was found around run `number`, 1 or 2."""
    extremes = records[f"{number}/extremes"]
    largest = extremes["largest"], extremes["largest_error"]
    probes = [_read_probe(records[name_probe(number, probe)]) for probe in range(config.probes)]
    threshold = -NEGATIVE * abs(largest[0])
    return Finding(
        label=f"run {number}" if config.second is not None else "this run",
        batch_size=run.get("step", {}).get("global_batch_size"),
        loss=extremes["loss"],
        num_weights=extremes["num_weights"],
        norm=extremes["norm"],
        largest=largest,
        smallest=(extremes["smallest"], extremes["smallest_error"]),
        products=extremes["products"],
        probes=probes,
        trace=estimate_trace(probes, extremes["num_weights"]) if probes else None,
        share_negative=share_below(probes, threshold) if probes else None,
        sharpness={size: records[name_sharpness(number, size)]["percent"] for size in config.sharpness},
        curve=records[f"{number}/curve"]["losses"] if config.points else [],
        landscape=[records[name_row(number, row)]["losses"] for row in range(config.grid)],
    )


def read_line(config: CurvatureConfig, records: Records) -> Line | None:
    """Gather what was found between two runs; None where there is one alone."""
    losses = {name.split("/")[1]: record["losses"] for name, record in records.items() if name.startswith("line/")}
    return Line(shares=line_shares(config.points), losses=losses) if losses else None


def _read_probe(record: Mapping[str, Any]) -> RitzValues:
    values, weights = (torch.tensor(record[name], dtype=torch.float64) for name in ("values", "weights"))
    return RitzValues(values=values, weights=weights, errors=torch.zeros_like(values))
