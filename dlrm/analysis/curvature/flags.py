"""What `recforge study curvature` can be told; free of torch, so that `--help` answers at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

_ONE = tyro.conf.arg(metavar="RUN")
_OTHER = tyro.conf.arg(metavar="[RUN2]")
_LEAST = {"samples": 1, "probes": 0, "steps": 2, "subspace": 1, "points": 0, "grid": 0, "seed": 0, "threads": 1}


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """Around which solutions to look, on what, and how closely."""

    run: tyro.conf.Positional[Annotated[Path, _ONE]]
    """A run's folder with checkpoints, or one checkpoint of it."""
    second: tyro.conf.Positional[Annotated[Path | None, _OTHER]] = None
    """Another run of the same network and data, to compare with, as one of a larger batch."""
    output: Path | None = None
    """The study's folder; if it holds an unfinished study of the same settings, that goes on. None makes a new one."""
    data: Path | None = None
    """The prepared dataset that the runs were trained on; None means where it was then."""
    best: bool = False
    """Of each run, take the best checkpoint instead of the last."""
    weights: Literal["dense", "all"] = "dense"
    """Whose eigenvalues and sharpness: the dense part, with all pooled rows as constants; or also every row that the
    sample touches. Landscapes and the line between two runs always move both."""
    samples: int = 4096
    """Samples of the train split that the loss is the mean of; and of the valid split, on the line."""
    steps: int = 80
    """Products with the Hessian for the extreme eigenvalues, at most; half as many per probe of the density. As many
    vectors are in memory, of 8 bytes per weight."""
    probes: int = 4
    """Random vectors that the density and the trace are estimated from; 0 leaves them out."""
    sharpness: tuple[float, ...] = (1e-3, 5e-4)
    """Sizes of the boxes in which the loss is maximised; none leaves sharpness out."""
    subspace: int | None = None
    """Maximise in a random subspace of so many dimensions; None is the full space."""
    points: int = 25
    """Of the curve along a random direction and of the line between two runs, from -1 to 2; 0 leaves them out."""
    grid: int = 21
    """Points along each side of the landscape over two random directions; 0 leaves it out."""
    reach: float = 1.0
    """How far curve and landscape go to either side; 1 is as far as the weights are long, filter by filter."""
    seed: int = 0
    """Of the sample, of directions and of starting vectors."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute, in float64; auto takes a GPU if there is one."""
    threads: int | None = None
    """CPU threads; None means every core this process may use."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"--{name}: expected at least {least}, got {number}")
        if not self.reach > 0 or not all(size > 0 for size in self.sharpness):
            raise ValueError(f"--reach, --sharpness: expected numbers above 0, got {self.reach}, {self.sharpness}")

    @property
    def runs(self) -> tuple[Path, ...]:
        """The runs to look at, one or two."""
        return (self.run,) if self.second is None else (self.run, self.second)

    @property
    def folder(self) -> Path:
        """Where the study is written."""
        return self.output or Path("studies") / f"curvature-{self.run.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
