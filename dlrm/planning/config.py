"""What `recforge plan` can be told, beside what its recipe says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dlrm.config import ModelConfig, ParallelConfig, SmallTablesConfig, TablesConfig

DEFAULT_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to plan for."""

    ranks: int = 8
    """Number of processes; none is started."""
    ranks_per_node: int | None = None
    """Of them on one machine; None means 8, or all if there are fewer."""
    memory: str | None = None
    """Memory per rank that tables may take, as 80GB; None means --parallel.memory, else what the machine has."""
    machine: Literal["cpu", "a100", "h100", "h200"] = "cpu"
    """Where the ranks run: cpu is this machine, as --calibrate has measured it, or else typical figures, with a core
    for each rank where there are several machines; the others are by their data sheets."""
    global_batch_size: int | None = None
    """Samples per step, over all ranks; None means the recipe's."""
    data: Path | None = None
    """A prepared dataset, or raw files, which are then prepared once."""
    output: Path | None = None
    """Write the plan as one HTML page."""
    simulate: str | None = None
    """Also foresee steps on these numbers of ranks, as 8,64,512."""
    calibrate: bool = False
    """Measure this machine first, for about a minute, and compare what is foreseen for 1, 2 and 4 ranks with it."""
    calibration: Path | None = None
    """Where the measurement is kept, or the one to plan with; None means recforge/machine.json in the user's cache
    folder, which is used on the machine that it is of."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tables: TablesConfig = field(default_factory=TablesConfig)
    small_tables: SmallTablesConfig = field(default_factory=SmallTablesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("ranks", "ranks_per_node", "global_batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
        if self.ranks % self.per_node:
            raise ValueError(
                f"--ranks-per-node: expected a divisor of --ranks {self.ranks}, got {self.per_node}"
                f"{' (the default)' if self.ranks_per_node is None else ''}"
            )
        for flag, given in (("--calibrate", self.calibrate), ("--calibration", self.calibration is not None)):
            if given and self.machine != "cpu":
                raise ValueError(f"{flag}: expected --machine cpu beside it, got {self.machine}")
        if self.output is not None and (self.output.is_dir() or not self.output.parent.is_dir()):
            raise ValueError(f"--output: expected a file in a folder that exists, got {self.output}")

    @property
    def per_node(self) -> int:
        """Ranks of one machine."""
        return self.ranks_per_node or min(self.ranks, DEFAULT_PER_NODE)
