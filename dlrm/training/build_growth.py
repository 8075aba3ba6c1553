"""Makes what watches the gradients' noise, and what lets batches grow, from a run's configuration."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dlrm.data.dataset import Dataset
from dlrm.noise.frequency_bands import count_bands, measure_frequencies
from dlrm.noise.gradient_meter import GradientMeter
from dlrm.noise.preconditioner import HAVE_SECOND_MOMENTS, Preconditioner
from dlrm.training.batch_growth import BatchGrowth, GrowthInsteadOfDecay, Rescale, StagedGrowth, TestedGrowth
from dlrm.training.batch_growth_config import parse_stages
from dlrm.training.batch_schedules import NoiseScaleSchedule
from dlrm.training.guards import find_tables
from dlrm.training.noise_watch import NoiseWatch
from embeddings.rescaling import rescale_states

if TYPE_CHECKING:
    from dlrm.config import TrainingConfig
    from dlrm.training.run_parts import RunParts

LARGEST_SHARE = 10  # of the training samples, one part (Smith et al. 2018, arXiv:1711.00489)


def watch_noise(run: RunParts) -> NoiseWatch:
    """Make what measures a run's gradients.

    Raises:
        ValueError: a test of gradients that are preconditioned was asked for, an optimizer preconditions none, or
            something follows the dense part's noise below a batch norm.
    """
    config, tables = run.config, find_tables(run.model)
    products = config.growth.test in ("inner_product", "augmented")
    if products and config.noise_scale.preconditioned:
        raise ValueError(
            f"--growth.test {config.growth.test}: expected gradients as they are, got --noise-scale.preconditioned; "
            "take --growth.test norm with it"
        )
    if config.noise_scale.preconditioned:
        for flag, optimizer in (("--dense.name", config.dense), ("--head.name", config.head.resolve(config.dense))):
            if optimizer.name not in HAVE_SECOND_MOMENTS:
                expected = ", ".join(HAVE_SECOND_MOMENTS)
                raise ValueError(f"--noise-scale.preconditioned: expected {flag} {expected}, got {optimizer.name}")
    is_exact = not any(isinstance(module, _BatchNorm) for module in run.model.modules())
    if not is_exact:
        _refuse_followers(config)
    bands = count_bands(
        _clicks_of(run, "leave --noise-scale.every-steps out"),
        [table for held in tables for table in held.table_configs],
    )
    return NoiseWatch(
        GradientMeter(run.model, run.ranks, bands=bands),
        config.noise_scale,
        products=products,
        preconditioner=Preconditioner(run.optimizer) if config.noise_scale.preconditioned else None,
        tells_dense=is_exact,
    )


def _refuse_followers(config: TrainingConfig) -> None:
    followers = [f"--growth.test {config.growth.test}"] * (config.growth.test != "none")
    followers += ["--rule adascale"] * (config.rule == "adascale")
    if followers:
        raise ValueError(
            f"{followers[0]}: expected a model without batch norm, as --model.batch-norm none, got one: below it no "
            "sample has a gradient of its own, and so no noise is known"
        )


def grow_batches(run: RunParts, watch: NoiseWatch | None) -> BatchGrowth:
    """Make what lets a run's batches grow.

    Args:
        run: its parts.
        watch: of the gradients, if they are measured.

    Raises:
        ValueError: naming the flag, for what does not go together.
    """
    config, growth, rows = run.config, run.config.growth, run.dataset.rows("train")
    first, round_to = config.step.global_batch_size, growth.round_to or find_multiple(run.model, run.ranks.count)
    largest = growth.max_batch_size or max(first, rows // LARGEST_SHARE)
    if largest < first:
        raise ValueError(f"--growth.max-batch-size: expected at least --step.global-batch-size {first}, got {largest}")
    rescale = rescale_tables(run) if growth.rescale_states and config.rows_are_rare is not False else None
    if config.staged_batches:  # of a schedule, which says their rates and warm-ups too
        return StagedGrowth(run.sizes, growth, list(config.staged_batches), rescale)
    if growth.stages:
        stages = parse_stages(growth.stages)
        if stages[0][1] <= first:
            raise ValueError(
                f"--growth.stages: expected sizes above --step.global-batch-size {first}, got {stages[0][1]}"
            )
        return StagedGrowth(run.sizes, growth, stages, rescale)
    if growth.instead_of_decay:
        schedule = NoiseScaleSchedule(
            config.dense_schedule.factor,
            first=first,
            largest=largest,
            total=math.ceil(config.epochs * rows),
            ratio=growth.step_ratio,
            round_to=round_to,
        )
        if len(schedule.stages) == 1:
            print(
                "recforge: --growth.instead-of-decay: no batch grows: --dense-schedule never comes down by "
                f"--growth.step-ratio {growth.step_ratio:g}, or --growth.max-batch-size {largest} is too small",
                file=sys.stderr,
            )
        return GrowthInsteadOfDecay(run.sizes, growth, schedule, rescale)
    if largest // round_to * round_to <= first:
        print(
            f"recforge: --growth.test {growth.test}: the batch is as large as it may be from the beginning: "
            f"--growth.max-batch-size {largest}, by multiples of {round_to}",
            file=sys.stderr,
        )
    if watch is None:
        raise ValueError(f"--growth.test {growth.test}: expected --noise-scale.every-steps of at least 1, got 0")
    return TestedGrowth(run.sizes, growth, watch, largest=largest, round_to=round_to, rescale=rescale)


def _clicks_of(run: RunParts, cure: str) -> Dataset:
    """Return the data of a run on clicks, whose samples' gradients and rows' frequencies can be measured.

    Raises:
        ValueError: it is a run on something else.
    """
    if not isinstance(run.dataset, Dataset):
        raise ValueError(f"expected a model of clicks, whose rows' frequencies are known, got one of sequences; {cure}")
    return run.dataset


def find_multiple(model: nn.Module, ranks: int) -> int:
    """Return what batch sizes should be multiples of, so that all ranks and all ghost batches are full."""
    ghosts = [int(size) for module in model.modules() if isinstance(size := getattr(module, "ghost", None), int)]
    return ranks * math.lcm(1, *ghosts)


def rescale_tables(run: RunParts) -> Rescale:
    """Return what brings a run's tables to another batch size: states by how often the data name each row, and eps.

    Raises:
        ValueError: the data do not say how often.
    """
    first, clicks = run.config.step.global_batch_size, _clicks_of(run, "add --growth.no-rescale-states")

    def rescale(before: int, after: int) -> None:
        for tables in find_tables(run.model):
            if before != after:
                rescale_states(tables, before, after, measure_frequencies(clicks, tables.table_configs))
            tables.set_eps_factor(first / after)

    return rescale
