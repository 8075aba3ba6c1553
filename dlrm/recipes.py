"""Named recipes: a data source and the configuration that suits it; `--data` and every flag override them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dlrm.config import EvaluationConfig, ModelConfig, RunConfig, SmallTablesConfig, StepConfig, TablesConfig
from dlrm.data.schema import DataSchema
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.scaling import scale_config

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


# Of tables under row-wise Adagrad; found in the comparison that docs/large_batch.md tells of.
ROW_RATE = 0.56
ROW_EPS_SAMPLES = 5.7  # eps times the batch size
ROW_LENGTH = 0.2  # with which a row starts, root of the mean square
DENSE_WARMUP_STEPS, TABLES_WARMUP_STEPS = 6, 60
# What tables keep when their optimizer becomes another one.
KEPT = ("rates", "weight_decay", "pooling", "init_scale", "kernel", "row_type", "memory")


def large_batch(config: RunConfig, global_batch_size: int) -> RunConfig:
    """Return a configuration that was tuned at its own batch size, for a larger one, in the way that costs least AUC.

    Rates follow the rule `auto`: that of the dense part grows with the root of the batch size, that of rows stays, and
    their eps falls with the batch size, as the gradients of rare rows do. Rows are updated by row-wise Adagrad, at a
    rate and an eps of its own where they were not before, and start long enough not to need many steps to grow. Both
    rates are warmed up for so many steps, rather than samples, as keep the few steps there are from being spent on
    recovering from the first. What each of these is worth is told in docs/large_batch.md.

    Args:
        config: at its batch size, with nothing left to scale.
        global_batch_size: the new one.

    Raises:
        ValueError: the configuration is itself to be scaled (`scale_from`).
    """
    if config.scale_from is not None:
        raise ValueError(
            f"large_batch: expected a configuration without scale_from, got scale_from={config.scale_from}"
        )
    step = replace(config.step, global_batch_size=global_batch_size)
    scaled, _ = scale_config(replace(config, step=step, scale_from=config.step.global_batch_size, rule="auto"))
    tables, small_tables = scaled.tables, scaled.small_tables
    if tables.optimizer != "rowwise_adagrad":
        kept = {name: getattr(tables, name) for name in KEPT}
        tables = TablesConfig(learning_rate=ROW_RATE, eps=ROW_EPS_SAMPLES / global_batch_size, **kept)
        # Their numbers are of the optimizer that was, or were chosen beside it.
        small_tables = SmallTablesConfig(below_rows=small_tables.below_rows)
    # Uniform numbers within plus and minus s have the mean square s * s / 3.
    least = ROW_LENGTH * math.sqrt(3 / config.model.dim)
    tables = replace(tables, init_scale=max(tables.init_scale or 0.0, least))
    return replace(
        scaled,
        scale_from=None,
        rule=config.rule,
        tables=tables,
        small_tables=small_tables,
        dense_schedule=_warm_up(scaled.dense_schedule, DENSE_WARMUP_STEPS * global_batch_size),
        tables_schedule=_warm_up(scaled.tables_schedule, TABLES_WARMUP_STEPS * global_batch_size),
    )


def _warm_up(schedule: Schedule, samples: int) -> Schedule:
    """Make a warm-up at least so long, at the cost of the decay, of which it takes half at most."""
    more = max(0, samples - schedule.warmup_samples)
    if schedule.decay_samples:
        more = min(more, schedule.decay_samples // 2)
    return replace(
        schedule,
        warmup_samples=schedule.warmup_samples + more,
        decay_samples=max(0, schedule.decay_samples - more),
    )


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
    "large-batch": Recipe(
        help="the same log at a batch of 4,096, nearly as good as with the best settings at 256",
        source="synthetic",
        config=large_batch(
            RunConfig(
                shuffle=False,
                model=ModelConfig(dim=8, bottom=(32,), top=(64, 32)),
                tables=TablesConfig(learning_rate=0.56, eps=0.0139, init_scale=0.0826),
                tables_schedule=Schedule(decay_samples=1_500_000, end_factor=0.1),
                dense=DenseOptimizerConfig(name="adam", learning_rate=0.00344),
                dense_schedule=Schedule(decay_samples=1_500_000, end_factor=0.1),
                step=StepConfig(global_batch_size=256),
                evaluation=EvaluationConfig(every_samples=500_000),
            ),
            4096,
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
    if is_file(name):
        from dlrm.data.config_file import load_config

        file = load_config(name)
        source = (file.schema, file.sources)
        return Recipe(help=f"the data and settings of {file.path}", source=source, config=file.run_config())
    raise ValueError(
        f"expected a recipe ({', '.join(RECIPES)}) of clicks or a configuration file (*.toml), got '{name}'"
    )


def is_file(name: str) -> bool:
    """Say whether a configuration file is named, which describes a recipe of clicks."""
    return name.endswith(".toml")


def list_recipes() -> list[str]:
    """Return a line per recipe: its name and what it is."""
    width = max(map(len, RECIPES))
    return [f"  {name:{width}}  {recipe.help}" for name, recipe in RECIPES.items()]
