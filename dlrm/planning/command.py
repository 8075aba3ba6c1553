"""`recforge plan`: where the tables of a recipe would lie on how many ranks, and how fast a step would be."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.planning.config import PlanConfig

if TYPE_CHECKING:
    from dlrm.planning.outlook import Outlook

SAME_FLAGS = (
    "The flags that begin with --model, --tables and --parallel are those of `recforge train`; what has no say in a "
    "plan, as --parallel.hang-timeout-seconds, --model.dropout or --tables.learning-rate, changes nothing here."
)


def run_plan(argv: list[str]) -> int:
    """Plan what `argv` names: a recipe or a configuration file, then flags."""
    from dlrm.recipes import find_recipe, list_recipes

    if not argv or argv[0].startswith("-"):
        print("usage: recforge plan RECIPE|CONFIG.toml [--ranks N] [--memory SIZE] [--output PAGE.html] ...")
        print("\n".join(["", "recipes:", *list_recipes(), "", "`recforge plan RECIPE --help` lists every flag."]))
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    recipe = find_recipe(argv[0])
    default = _start_from(recipe.config)
    description = f"{recipe.help}\n\n{SAME_FLAGS}"
    config = parse(PlanConfig, argv[1:], program=f"recforge plan {argv[0]}", description=description, default=default)
    given = {name: getattr(config, name) for name in ("model", "tables", "small_tables", "parallel", "data")}
    run = replace(recipe.config, **given)
    from dlrm.planning.outlook import look_ahead

    outlook = look_ahead(argv[0], recipe.source, config, run)
    if config.output is not None:  # before the text, whose reader may have seen enough, as `head`
        _write(outlook, config.output)
    print(outlook.text())
    return 0


def _start_from(run: RunConfig) -> PlanConfig:
    return PlanConfig(
        data=run.data,
        global_batch_size=run.step.global_batch_size,
        model=run.model,
        tables=run.tables,
        small_tables=run.small_tables,
        parallel=run.parallel,
    )


def _write(outlook: Outlook, output: Path) -> None:
    from dlrm.planning.page import write_page

    write_page(outlook, output)
    print(f"recforge: {output}", file=sys.stderr)
