"""What an arm of the comparison of large batches is, and the run that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.large_batch_tuning import Space
from dlrm.config import (
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    ModelConfig,
    RunConfig,
    StepConfig,
    TablesConfig,
)
from dlrm.noise.config import NoiseScaleConfig
from dlrm.optim.config import DenseOptimizerConfig, DenseOptimizerName
from dlrm.optim.lr_schedules import Schedule
from dlrm.recipes import large_batch
from dlrm.training.batch_growth_config import BatchGrowthConfig

TableOptimizer = Literal["rowwise_adagrad", "adam", "lamb", "cowclip"]
# What a search varies, and up to which factor away from its start.
SEARCHED = {
    "dense_rate": 2.5,
    "tables_rate": 2.5,
    "eps": 3.0,
    "init_scale": 2.0,
    "end_factor": 4.0,
    "dense_warmup_steps": 4.0,
    "tables_warmup_steps": 4.0,
    "clip": 10.0,
    "l2": 10.0,
}


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is the same for every arm on a log.

    Attributes:
        model: that is trained.
        batch_size: of the small batch.
        epochs: passes over the training rows.
        shuffle: whether an epoch has an order of its own, or that of time.
    """

    model: ModelConfig
    batch_size: int
    epochs: int
    shuffle: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What differs between arms.

    Attributes:
        dense: optimizer of the MLPs.
        tables: optimizer of the tables' rows.
        dense_rate: its peak learning rate.
        tables_rate: that of the rows.
        eps: of the rows' optimizer.
        init_scale: rows start uniform within plus and minus this.
        end_factor: what both rates have fallen to, linearly, at the end of the run.
        dense_warmup_steps: in which the dense part's rate rises from 0.
        tables_warmup_steps: in which that of the rows does.
        clip: of cowclip.
        l2: of cowclip.
    """

    dense: DenseOptimizerName
    tables: TableOptimizer
    dense_rate: float
    tables_rate: float
    eps: float
    init_scale: float
    end_factor: float
    dense_warmup_steps: float
    tables_warmup_steps: float
    clip: float | None = None
    l2: float | None = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        factor: of its batch size over the small one.
        settings: of it.
        start: where a search of them begins; None where a rule gives them.
        is_recipe: take what `recipes.large_batch` makes of the settings at the small batch.
        growth: how the batch grows up to `factor` times the small one, with which it begins.
    """

    factor: int
    settings: Settings
    start: Settings | None = None
    is_recipe: bool = False
    growth: BatchGrowthConfig | None = None

    @property
    def space(self) -> Space:
        """What is searched, and within which bounds."""
        if self.start is None:
            return {}
        # LAMB's rows have a length of step that does not depend on their gradients.
        names = [name for name in SEARCHED if name != "eps" or self.start.tables != "lamb"]
        centres = {name: getattr(self.start, name) for name in names if getattr(self.start, name) is not None}
        return {name: (centre / SEARCHED[name], centre * SEARCHED[name]) for name, centre in centres.items()}


def configure(log: Log, arm: Arm, *, rows: int, seed: int, threads: int) -> RunConfig:
    """Return the configuration of an arm's run on `rows` training rows."""
    if arm.is_recipe:
        small = configure(log, replace(arm, factor=1, is_recipe=False), rows=rows, seed=seed, threads=threads)
        return large_batch(small, log.batch_size * arm.factor)
    config = _configure(log, arm.settings, log.batch_size * (1 if arm.growth else arm.factor), rows)
    config = replace(config, seed=seed, step=replace(config.step, threads=threads))
    if arm.growth is None:
        return config
    growth = replace(arm.growth, max_batch_size=log.batch_size * arm.factor)
    return replace(config, growth=growth, rule="sqrt", noise_scale=NoiseScaleConfig(every_steps=20))


def _configure(log: Log, settings: Settings, batch_size: int, rows: int) -> RunConfig:
    samples = rows * log.epochs

    def schedule(warmup_steps: float) -> Schedule:
        warmup = min(round(warmup_steps * batch_size), samples // 2)
        return Schedule(warmup_samples=warmup, decay_samples=samples - warmup, end_factor=settings.end_factor)

    return RunConfig(
        epochs=log.epochs,
        shuffle=log.shuffle,
        model=log.model,
        tables=TablesConfig(
            optimizer=settings.tables,
            learning_rate=settings.tables_rate,
            eps=settings.eps,
            clip=settings.clip,
            l2=settings.l2,
            init_scale=settings.init_scale,
        ),
        tables_schedule=schedule(settings.tables_warmup_steps),
        dense=DenseOptimizerConfig(name=settings.dense, learning_rate=settings.dense_rate),
        dense_schedule=schedule(settings.dense_warmup_steps),
        step=StepConfig(global_batch_size=batch_size, device="cpu"),
        evaluation=EvaluationConfig(test_best=False),
        checkpoint=CheckpointConfig(keep_last=1),
        noise_scale=NoiseScaleConfig(every_steps=0),
        # An arm that learns nothing is a result.
        guards=GuardConfig(chance_evaluations=0, constant_prediction=False),
    )


def apply_rules(base: Settings, factor: int, names: Sequence[str], *, kind: str = "") -> dict[str, Arm]:
    """Return arms without a search: the base as it is, and by rules; `kind` tells several bases' arms apart."""
    root = factor**0.5
    as_many_steps = {name: getattr(base, name) for name in ("dense_warmup_steps", "tables_warmup_steps")}
    # What is a number of samples stays one.
    base = replace(base, **{name: steps / factor for name, steps in as_many_steps.items()})
    by_root = {"dense_rate": base.dense_rate * root, "tables_rate": base.tables_rate * root}
    changes: dict[str, dict[str, Any]] = {
        "unscaled": {},
        "sqrt": by_root,
        "rare": {"dense_rate": base.dense_rate * root, "eps": base.eps / factor} | as_many_steps,
    }
    return {f"{name}{kind}_{factor}x": Arm(factor=factor, settings=replace(base, **changes[name])) for name in names}


def searched(factor: int, start: Settings, **found: Any) -> Arm:
    """Return an arm whose search begins at `start` and has found what else is given."""
    return Arm(factor=factor, settings=replace(start, **found), start=start)
