"""What a study is asked, from the recipe's name and the flags; free of torch, so that `--help` answers at once."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.recipes import Recipe, find_recipe, list_recipes

Config = TypeVar("Config", bound=RunConfig)

# What has no say in the result of a trial; all else must stay as it is when a study goes on.
PLACES = ("output", "data", "max_restarts", "log_every_samples", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Asked(Generic[Config]):
    """What was asked for.

    What a trial gives depends on the data too: add their fingerprint to `settings()` for `StudyFolder` to compare.

    Attributes:
        kind: of the study.
        recipe_name: as given.
        recipe: of that name.
        config: a `RunConfig` and the study's own settings.
        folder: where the study is written.
    """

    kind: str
    recipe_name: str
    recipe: Recipe
    config: Config
    folder: Path

    @property
    def run(self) -> RunConfig:
        """The configuration of a run, without the study's own settings."""
        return RunConfig(**{field.name: getattr(self.config, field.name) for field in fields(RunConfig)})

    def settings(self) -> dict[str, Any]:
        """Return what decides the result of each trial, for `StudyFolder` to compare."""
        described = {name: value for name, value in asdict(self.config).items() if name not in PLACES}
        return {"recipe": self.recipe_name, **described}


def read_flags(kind: str, config: type[Config], argv: list[str], *, description: str) -> Asked[Config] | None:
    """Read a recipe's name and flags; where there is no recipe, print a usage and return None.

    Args:
        kind: of the study.
        config: inherits `RunConfig` and has a default for everything else.
        argv: what follows the kind.
        description: of the study, for its `--help`.

    Raises:
        ValueError: there is no such recipe, a flag does not exist, or its value is not accepted.
    """
    if not argv or argv[0].startswith("-"):
        usage = [f"usage: recforge study {kind} RECIPE|CONFIG.toml [--output FOLDER] ...", "", "recipes:"]
        print("\n".join([*usage, *list_recipes(), "", f"`recforge study {kind} RECIPE --help` lists every flag."]))
        return None
    recipe = find_recipe(argv[0])
    start = config(**{field.name: getattr(recipe.config, field.name) for field in fields(RunConfig)})
    program = f"recforge study {kind} {argv[0]}"
    read = parse(config, argv[1:], program=program, description=description, default=start)
    _check(read)
    folder = read.output or Path("studies") / f"{kind}-{Path(argv[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Asked(kind=kind, recipe_name=argv[0], recipe=recipe, config=read, folder=folder)


def _check(run: RunConfig) -> None:
    """Check that nothing is asked for that a study's trials would not heed."""
    if run.ranks not in (None, 1):
        raise ValueError(f"--ranks: expected 1 in a study, whose trials train in one process, got {run.ranks}")
    if run.time_limit_seconds is not None:
        raise ValueError(
            "--time-limit-seconds: expected none in a study, whose trials are compared by samples, got "
            f"{run.time_limit_seconds:g}; --epochs limits them"
        )
    if run.scale_from is not None:
        raise ValueError(
            f"--scale-from: expected none in a study, got {run.scale_from}; give the numbers that `recforge train` "
            "prints with it"
        )
    if run.branch_from is not None:
        raise ValueError(f"--branch-from: expected none in a study, whose trials begin anew, got {run.branch_from}")
