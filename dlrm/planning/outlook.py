"""Everything that `recforge plan` finds out: the plan, the step it leads to, and steps on other numbers of ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.config import RunConfig
from dlrm.data.dataset import Dataset
from dlrm.data.schema import DataSchema
from dlrm.descriptions import describe_tables
from dlrm.planning.config import PlanConfig
from dlrm.planning.dense_cost import DenseCost, dense_cost
from dlrm.planning.foresee import Foresight, foresee
from dlrm.planning.measurement import (
    Measurement,
    default_path,
    load_measurement,
    measured_now,
    save_measurement,
    this_place,
)
from dlrm.planning.plan_run import memory_for_tables, parse_bytes, plan_run
from dlrm.planning.simulate import Scaling, parse_counts, simulate
from dlrm.planning.statistics import measure_usage
from dlrm.planning.text import describe_plan, describe_ranks, describe_scaling, describe_step
from dlrm.this_machine import count_cores
from embeddings.planning.machine import MACHINES, Machine
from embeddings.planning.table_cost import Setting
from embeddings.shards import EXCHANGE_BYTES, ShardingPlan
from embeddings.tables import TableConfig
from embeddings.usage import Usage

if TYPE_CHECKING:
    from dlrm.planning.comparison import Comparison


@dataclass(frozen=True, kw_only=True)
class Question:
    """What stays the same whatever the number of ranks.

    Attributes:
        configs: the tables.
        dense: the dense part.
        run: the run's settings.
        usage: what batches ask for.
        machine: where the ranks run.
        ranks_per_node: at most so many share a machine.
    """

    configs: Sequence[TableConfig]
    dense: DenseCost
    run: RunConfig
    usage: Usage
    machine: Machine
    ranks_per_node: int

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of each rank, for tables."""
        return self.machine.memory_for(self.run.tables.memory)

    def answer(self, ranks: int, global_batch_size: int, *, limited: bool = True) -> tuple[ShardingPlan, Foresight]:
        """Plan for so many ranks, and foresee the step."""
        setting = Setting(
            machine=self.machine if limited else replace(self.machine, memory_bytes=None, host_memory_bytes=None),
            usage=replace(self.usage, global_batch_size=global_batch_size),
            ranks=ranks,
            ranks_per_node=min(ranks, self.ranks_per_node),
            exchange_bytes=EXCHANGE_BYTES[self.run.parallel.exchange],
        )
        plan = plan_run(
            self.configs,
            self.run.parallel,
            setting,
            memory_flag="--memory",
        )
        return plan, foresee(self.configs, plan, self.dense, setting)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What was found out.

    Attributes:
        name: of the recipe.
        dataset: what the statistics are of.
        question: what was asked.
        plan: where tables lie.
        foresight: the step.
        scalings: steps on other numbers of ranks.
        comparisons: what was foreseen and what was measured on this machine.
    """

    name: str
    dataset: Dataset
    question: Question
    plan: ShardingPlan
    foresight: Foresight
    scalings: Sequence[Scaling] = ()
    comparisons: Sequence[Comparison] = ()

    def text(self) -> str:
        """Return everything as text."""
        parts = [
            describe_plan(self.question.configs, self.plan),
            describe_ranks(self.foresight, self.question.memory_bytes),
            describe_step(self.foresight),
        ]
        if self.scalings:
            parts.append(describe_scaling(self.scalings))
        if self.comparisons:
            from dlrm.planning.comparison import describe_comparisons

            parts.append(describe_comparisons(self.comparisons))
        return "\n\n".join(parts)


def look_ahead(
    name: str, source: str | tuple[DataSchema, tuple[Path, ...]], config: PlanConfig, run: RunConfig
) -> Outlook:
    """Provide the data, plan its tables and foresee a step.

    Raises:
        ValueError: the tables do not fit, or a flag is out of range.
    """
    from dlrm.data.provide import provide_dataset

    counts = parse_counts(config.simulate, config.per_node) if config.simulate is not None else []
    if config.machine == "cpu" and run.tables.memory != "device":
        gpus = ", ".join(name for name in MACHINES if name != "cpu")
        raise ValueError(
            f"--tables.memory: expected device on --machine cpu, got {run.tables.memory}; plan for --machine {gpus}"
        )
    memory, kept = _parse_memory(config), _load_kept(config)
    dataset = provide_dataset(source, config.data)
    configs = describe_tables(dataset.info, run.model.dim, run.tables, run.small_tables)
    size = config.global_batch_size or run.step.global_batch_size
    dense = dense_cost(run.model, len(dataset.info.numeric), [c.dim for c in configs for _ in c.features])
    usage = measure_usage(dataset, configs, size)
    machine, comparisons = _find_machine(config, kept, configs, dense, run, dataset, usage)
    question = Question(
        configs=configs,
        dense=dense,
        run=run,
        usage=usage,
        machine=_limit(machine, memory, config),
        ranks_per_node=config.per_node,
    )
    plan, foresight = question.answer(config.ranks, size)
    scalings = []
    if counts:
        scalings = simulate(
            counts,
            lambda ranks, batch: question.answer(ranks, batch, limited=ranks > 1)[1],
            ranks=config.ranks,
            global_batch_size=size,
        )
    return Outlook(
        name=name,
        dataset=dataset,
        question=question,
        plan=plan,
        foresight=foresight,
        scalings=scalings,
        comparisons=comparisons,
    )


def _limit(machine: Machine, memory: int | None, config: PlanConfig) -> Machine:
    """Return the machine with the memory that was asked for, or that is known."""
    if memory is not None:
        return replace(machine, memory_bytes=memory, host_memory_bytes=memory)
    return replace(machine, memory_bytes=machine.memory_bytes or memory_for_tables("cpu", config.per_node))


def _find_machine(
    config: PlanConfig,
    kept: Measurement | None,
    configs: Sequence[TableConfig],
    dense: DenseCost,
    run: RunConfig,
    dataset: Dataset,
    usage: Usage,
) -> tuple[Machine, Sequence[Comparison]]:
    """Return the machine to plan for; with --calibrate it is measured now, and kept."""
    comparisons: Sequence[Comparison] = ()
    if config.calibrate:
        from dlrm.planning.comparison import calibrate

        step = replace(run.step, global_batch_size=usage.global_batch_size)
        measured, comparisons = calibrate(configs, dense, replace(run, step=step), dataset, usage)
        kept, path = measured_now(measured), config.calibration or default_path()
        save_measurement(kept, path)
        print(f"recforge: the measurement is kept in {path}", file=sys.stderr)
    machine = MACHINES[config.machine]
    if kept:
        machine = kept.machine
    elif config.machine == "cpu" and config.ranks == config.per_node:  # of several machines, this one tells nothing
        machine = replace(machine, cores_per_node=count_cores())
    return replace(machine, padded=machine.padded or run.tables.kernel == "fbgemm"), comparisons


def _load_kept(config: PlanConfig) -> Measurement | None:
    """Return the measurement to plan with; one in the default place must be of this machine.

    Raises:
        ValueError: the file that was named is missing, or holds something else.
    """
    if config.calibrate or config.machine != "cpu":
        return None
    kept = load_measurement(config.calibration or default_path())
    if config.calibration is not None:
        if kept is None:
            raise ValueError(
                f"--calibration: expected a measurement in {config.calibration}, found none; --calibrate writes it"
            )
        return kept
    if kept is None:
        print("recforge: machine 'cpu' by typical figures; --calibrate measures this one", file=sys.stderr)
    elif kept.place != this_place():
        print(
            f"recforge: machine 'cpu' by typical figures: {default_path()} was measured on {kept.place}, and this is "
            f"{this_place()}; --calibrate measures this one, --calibration PATH takes a measurement as it is",
            file=sys.stderr,
        )
        return None
    return kept


def _parse_memory(config: PlanConfig) -> int | None:
    if config.memory is not None:
        return parse_bytes(config.memory, "--memory")
    given = config.parallel.memory
    return None if given is None else parse_bytes(given, "--parallel.memory")
