"""Named recipes: a data source and the configuration that suits it; `--data` and every flag override them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlrm.config import EvaluationConfig, ModelConfig, RunConfig, StepConfig, TablesConfig
from dlrm.data.schema import DataSchema
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule

Source = Literal["synthetic", "criteo-kaggle", "criteo-terabyte", "criteo-kaggle-sample", "movielens-100k"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `recforge train NAME` runs.

    Attributes:
        help: one line for the list of recipes.
        source: how `--data` is read when it is not a prepared dataset: by name (`synthetic` needs no data), or the
            schema and the files of a configuration.
        config: of the run.
    """

    help: str
    source: Source | tuple[DataSchema, tuple[Path, ...]]
    config: RunConfig


RECIPES: dict[str, Recipe] = {
    "synthetic": Recipe(
        help="a click log of our own making, whose best possible AUC is known; needs no data",
        source="synthetic",
        config=RunConfig(
            # The log drifts: in the order of time, and with a rate that does not vanish, the model ends up to date.
            shuffle=False,
            model=ModelConfig(dim=16, bottom=(64,), top=(64, 32)),
            tables=TablesConfig(learning_rate=1.0, eps=0.01),
            tables_schedule=Schedule(decay_samples=1_500_000, end_factor=0.2),
            dense=DenseOptimizerConfig(name="lamb", learning_rate=0.01),
            dense_schedule=Schedule(warmup_samples=50_000, decay_samples=1_450_000, end_factor=0.2),
            step=StepConfig(global_batch_size=2048),
            evaluation=EvaluationConfig(every_samples=500_000),
        ),
    ),
    "criteo-kaggle": Recipe(
        help="the Criteo Kaggle display-ads log (train.txt), 45.8 million rows",
        source="criteo-kaggle",
        config=RunConfig(
            model=ModelConfig(dim=16, bottom=(512, 256, 64), top=(512, 256)),
            tables=TablesConfig(learning_rate=0.02),
            dense=DenseOptimizerConfig(name="lamb", learning_rate=0.005),
            dense_schedule=Schedule(warmup_samples=2_000_000),
            step=StepConfig(global_batch_size=8192),
            evaluation=EvaluationConfig(every_samples=8_000_000),
        ),
    ),
    "criteo-terabyte": Recipe(
        help="the Criteo 1 TB click log (day_0 ... day_23), 4.4 billion rows",
        source="criteo-terabyte",
        config=RunConfig(
            model=ModelConfig(dim=128, bottom=(512, 256), top=(1024, 1024, 512, 256)),
            tables=TablesConfig(learning_rate=0.02),
            dense=DenseOptimizerConfig(name="lamb", learning_rate=0.005),
            dense_schedule=Schedule(warmup_samples=100_000_000),
            step=StepConfig(global_batch_size=65_536),
            evaluation=EvaluationConfig(every_samples=200_000_000),
        ),
    ),
    # How the next two were chosen, on folds of their training rows, is told in docs/results.md.
    "criteo-kaggle-sample": Recipe(
        help="the first 10,000 rows of the Criteo Kaggle log: 8,000 to train, 2,000 to test",
        source="criteo-kaggle-sample",
        config=RunConfig(
            epochs=4,
            model=ModelConfig(dim=32, bottom=(128,), top=(), interaction="fm"),
            tables=TablesConfig(learning_rate=0.005, init_scale=0.01),
            dense=DenseOptimizerConfig(name="lamb", learning_rate=0.006),
            dense_schedule=Schedule(decay_samples=32_000),
            tables_schedule=Schedule(decay_samples=32_000),
            step=StepConfig(global_batch_size=256),
        ),
    ),
    "movielens-100k": Recipe(
        help="MovieLens-100K: clicks are ratings of 4 and 5, users and items with their attributes",
        source="movielens-100k",
        config=RunConfig(
            epochs=3,
            model=ModelConfig(
                dim=8, bottom=(), top=(64,), interaction="dcn", cross_layers=1, cross_rank=16, dropout=0.3
            ),
            tables=TablesConfig(learning_rate=0.014, init_scale=0.01),
            dense=DenseOptimizerConfig(name="lamb", learning_rate=0.007),
            step=StepConfig(global_batch_size=512),
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name, or what a configuration file describes.

    Raises:
        ValueError: there is no such recipe, or the file is not a configuration.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".toml"):
        from dlrm.data.config_file import load_config

        return load_config(Path(name)).recipe()
    raise ValueError(f"expected a recipe ({', '.join(RECIPES)}) or a configuration file (*.toml), got '{name}'")


def list_recipes() -> list[str]:
    """Return a line per recipe: its name and what it is."""
    width = max(map(len, RECIPES))
    return [f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()]
