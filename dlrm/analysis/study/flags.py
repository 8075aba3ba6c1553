"""What a study is asked, from the recipe's name and the flags; free of torch, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.recipes import Recipe, find_recipe, list_recipes

# What has no say in the result of a trial; all else must stay as it is when a study goes on.
PLACES = ("output", "data", "max_restarts", "log_every_samples", "checkpoint")

# What is refused, and why; a configuration file may have it all the same.
REFUSED = {
    "ranks": "whose trials train in one process",
    "time_limit_seconds": "whose trials are compared by samples; --epochs limits them",
    "scale_from": "give the numbers that `recforge train` prints with it",
    "branch_from": "whose trials begin anew",
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(RunConfig):
    """What trials have in common, to which a study adds a field `study` with its own settings."""

    output: Path | None = None
    """The study's folder; if it holds an unfinished study of the same flags, that goes on. None makes a new one under
    studies/."""
    ranks: tyro.conf.Suppress[int | None] = None
    time_limit_seconds: tyro.conf.Suppress[float | None] = None
    scale_from: tyro.conf.Suppress[int | None] = None
    branch_from: tyro.conf.Suppress[Path | None] = None


Config = TypeVar("Config", bound=StudyConfig)


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
        config: inherits `StudyConfig` and has a default for everything else.
        argv: what follows the kind.
        description: of the study, for its `--help`.

    Raises:
        ValueError: there is no such recipe, a flag does not exist, or its value is not accepted.
    """
    if not argv or argv[0].startswith("-"):
        _print_usage(kind, config, description, has_asked=bool(argv) and argv[0] in ("-h", "--help"))
        return None
    _check_flags(argv[1:])
    recipe = find_recipe(argv[0])
    start = config(**{field.name: getattr(recipe.config, field.name) for field in fields(RunConfig)})
    program = f"recforge study {kind} {argv[0]}"
    read = parse(config, argv[1:], program=program, description=description, default=start)
    _check(read)
    folder = read.output or Path("studies") / f"{kind}-{Path(argv[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Asked(kind=kind, recipe_name=argv[0], recipe=recipe, config=read, folder=folder)


def run_asked(
    kind: str, config: type[Config], argv: list[str], *, description: str, study: Callable[[Asked[Config]], str]
) -> int:
    """Run a study as its flags ask, print its verdict, and return an exit status.

    Args:
        kind: of the study.
        config: see `read_flags`.
        argv: what follows the kind.
        description: of the study, for its `--help`.
        study: runs it, and returns its verdict.
    """
    asked = read_flags(kind, config, argv, description=description)
    if asked is None:
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    print(study(asked))
    return 0


def _print_usage(kind: str, config: type[Config], description: str, *, has_asked: bool) -> None:
    """Print how a study is called; to who has asked for help, with its own flags."""
    usage = f"recforge study {kind} RECIPE|CONFIG.toml"
    every = f"`recforge study {kind} RECIPE --help` lists every flag, also those of `recforge train`."
    recipes = ["recipes:", *list_recipes(), "", every]
    if not has_asked:
        print("\n".join([f"usage: {usage} [--output FOLDER] ...", "", *recipes]))
        return
    own: Any = config()
    with contextlib.suppress(SystemExit):
        tyro.cli(type(own.study), prog=usage, description=description, args=["--help"])
    print("\n".join(recipes))


def _check_flags(argv: list[str]) -> None:
    """Check that no flag is given that is refused, and which the parser does not know therefore."""
    for argument in argv:
        name, _, value = argument.partition("=")
        if (option := name.removeprefix("--").replace("-", "_")) in REFUSED and name.startswith("--"):
            raise ValueError(_refuse(option, value or "one"))


def _refuse(option: str, value: Any) -> str:
    return f"--{option.replace('_', '-')}: expected none in a study, {REFUSED[option]}; got {value}"


def _check(run: RunConfig) -> None:
    """Check that a configuration file asks for nothing that a study's trials would not heed."""
    for option in REFUSED:
        value = getattr(run, option)
        if value is not None and (option, value) != ("ranks", 1):
            raise ValueError(_refuse(option, value))
