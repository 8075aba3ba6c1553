"""`recforge train`: from a recipe's name or a configuration file to a finished run."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from dlrm.cli import parse
from dlrm.config import RunConfig
from dlrm.recipes import RECIPES, Recipe


def run_train(argv: list[str]) -> int:
    """Train what `argv` names: a recipe or a configuration file, then flags."""
    if not argv or argv[0].startswith("-"):
        print(_usage())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    recipe = _find_recipe(argv[0])
    program = f"recforge train {argv[0]}"
    config = parse(RunConfig, argv[1:], program=program, description=recipe.help, default=recipe.config)
    summary = train(argv[0], recipe, config)
    print(_describe(summary))
    return 0


def train(name: str, recipe: Recipe, config: RunConfig) -> dict[str, Any]:
    """Provide the data, build the model, train it, and return the summary.

    Raises:
        ValueError: see `Trainer`; or `config.output` holds a run of another configuration.
    """
    import torch

    from dlrm.data.provide import provide_dataset
    from dlrm.model import build_dlrm, describe_tables
    from dlrm.training.guards import check_memory
    from dlrm.training.run_state import seed_generators
    from dlrm.training.train_step import choose_device, compile_dense, describe_step
    from dlrm.training.trainer import Trainer

    output = config.output or Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    torch.set_num_threads(config.step.threads or len(os.sched_getaffinity(0)))
    device = choose_device(config.step.device)
    for line in [f"run {output}", *describe_step(config.step, device, torch.get_num_threads())]:
        print(f"recforge: {line}", file=sys.stderr)
    dataset = provide_dataset(recipe.source, config.data)
    if device.type == "cpu":
        check_memory(describe_tables(dataset.info, config.model.dim, config.tables))
    seed_generators(config.seed)
    model = build_dlrm(dataset.info, config.model, config.tables, seed=config.seed, device=str(device))
    if config.step.compile:
        compile_dense(model, device)
    return Trainer(model, dataset, config, output, recipe=name).fit()


def _find_recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".toml"):
        from dlrm.data.config_file import load_config

        return load_config(Path(name)).recipe()
    raise ValueError(f"expected a recipe ({', '.join(RECIPES)}) or a configuration file (*.toml), got '{name}'")


def _usage() -> str:
    width = max(map(len, RECIPES))
    lines = [f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()]
    return "\n".join(
        [
            "usage: recforge train RECIPE|CONFIG.toml [--data PATH] [--output RUN] [--seed N] ...",
            "",
            "recipes:",
            *lines,
            "",
            "`recforge train RECIPE --help` lists every flag of a recipe with its value there.",
        ]
    )


def _describe(summary: dict[str, Any]) -> str:
    line = f"auc {summary['auc']:.4f}"
    if "bayes_auc" in summary:
        line += (
            f"   best possible {summary['bayes_auc']:.4f}   "
            f"recovered {summary['recovered_auc']:.1%} of what lies above .5"
        )
    return (
        f"{line}\nlogloss {summary['logloss']:.4f}   normalized entropy {summary['normalized_entropy']:.4f}   "
        f"calibration {summary['calibration']:.3f}   on the {summary['split']} split\n"
        f"{summary['samples']:,} samples in {summary['seconds']:.1f} s ({summary['samples_per_second']:,.0f}/s), "
        f"{summary['stopped']}\n{summary['folder']}: `recforge report {summary['folder']}` makes a page of it"
    )
