"""`recforge plan`: where the tables of a recipe would lie on how many ranks, and how fast a step would be."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dlrm.cli import parse
from dlrm.config import ModelConfig, ParallelConfig, RunConfig, TablesConfig

if TYPE_CHECKING:
    from dlrm.planning.outlook import Outlook

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


def run_plan(argv: list[str]) -> int:
    """Plan what `argv` names: a recipe or a configuration file, then flags."""
    from dlrm.recipes import find_recipe, list_recipes

    if not argv or argv[0].startswith("-"):
        print("usage: recforge plan RECIPE|CONFIG.toml [--ranks N] [--memory SIZE] [--output PAGE.html] ...")
        print("\n".join(["", "recipes:", *list_recipes(), "", "`recforge plan RECIPE --help` lists every flag."]))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    recipe = find_recipe(argv[0])
    default = _start_from(recipe.config)
    config = parse(PlanConfig, argv[1:], program=f"recforge plan {argv[0]}", description=recipe.help, default=default)
    run = replace(recipe.config, model=config.model, tables=config.tables, parallel=config.parallel, data=config.data)
    from dlrm.planning.outlook import look_ahead

    outlook = look_ahead(argv[0], recipe.source, config, run)
    try:
        print(outlook.text(), flush=True)
    except BrokenPipeError:  # who reads has seen enough, as `head`; what is left must not be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if config.output is not None:
        _write(outlook, config.output)
    return 0


def _start_from(run: RunConfig) -> PlanConfig:
    return PlanConfig(
        data=run.data,
        global_batch_size=run.step.global_batch_size,
        model=run.model,
        tables=run.tables,
        parallel=run.parallel,
    )


def _write(outlook: Outlook, output: Path) -> None:
    from dlrm.planning.page import write_page

    write_page(outlook, output)
    print(f"recforge: {output}", file=sys.stderr)
