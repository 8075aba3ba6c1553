"""What was foreseen for 1, 2 and 4 ranks of the machine at hand, beside what a short training took."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dlrm.config import RunConfig
from dlrm.data.dataset import Dataset
from dlrm.planning.calibration import COUNTS, fit_machine, run_probe
from dlrm.planning.dense_cost import DenseCost
from dlrm.planning.findings import TINY_BATCH, Findings, ProbeTask
from dlrm.planning.foresee import foresee
from dlrm.planning.plan_run import plan_run
from dlrm.planning.text import align, format_milliseconds
from dlrm.this_machine import count_cores
from embeddings.planning.machine import CPU, Machine
from embeddings.planning.table_cost import Setting
from embeddings.planning.task import count_of
from embeddings.shards import EXCHANGE_BYTES, ShardingPlan
from embeddings.tables import TableConfig
from embeddings.usage import Usage

IDLE = 0.3  # of the cores, as the load of the last minute
BUSY = 1.3  # times the fastest quarter, for a median


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number of ranks, on this machine.

    Attributes:
        ranks: number of ranks, of one thread each.
        foreseen: seconds of a step.
        measured: seconds of a step, by the fastest quarter of a short training.
        median: of the same training; where it is far above, others used the machine.
    """

    ranks: int
    foreseen: float
    measured: float
    median: float

    @property
    def error(self) -> float:
        """By what share of the measured time foresight is off; above 0 it expected more."""
        return self.foreseen / self.measured - 1


def calibrate(
    configs: Sequence[TableConfig], dense: DenseCost, run: RunConfig, dataset: Dataset, usage: Usage
) -> tuple[Machine, list[Comparison]]:
    """Measure this machine, and train a little with 1, 2 and 4 ranks.

    What is foreseen is fitted to single operations, not to the steps that it is compared with, but for one number: what
    a step of one rank takes however small its batch is. More ranks than cores are not fitted to at all.

    Raises:
        ValueError: a measurement failed.
    """
    load, cores = os.getloadavg()[0], count_cores()
    if load > IDLE * cores:
        print(
            f"recforge: warning: other programs keep this machine busy (load {load:.1f} on {count_of(cores, 'core')}): "
            "the measurement will be wrong; --calibrate again when it is idle",
            file=sys.stderr,
        )
    plans: dict[int, ShardingPlan] = {}
    padded, number = run.tables.kernel == "fbgemm", EXCHANGE_BYTES[run.parallel.exchange]
    settings = {
        ranks: Setting(
            machine=replace(CPU, padded=padded), usage=usage, ranks=ranks, ranks_per_node=ranks, exchange_bytes=number
        )
        for ranks in COUNTS
    }
    found: dict[int, Findings] = {}
    for ranks, setting in settings.items():
        print(f"recforge: measuring {ranks} rank{'s' if ranks > 1 else ''} of one thread each", file=sys.stderr)
        plans[ranks] = plan_run(configs, run.parallel, setting)
        found[ranks] = _probe(dataset, run, plans[ranks])
    machine = fit_machine(found)
    overhead = _overhead(configs, dense, plans[1], settings[1], replace(machine, padded=padded), found[1])
    machine = replace(machine, seconds_per_step=overhead)
    here = replace(machine, padded=padded)  # which is the kernel's, and not kept with the machine
    return machine, [
        Comparison(
            ranks=ranks,
            foreseen=foresee(configs, plans[ranks], dense, replace(setting, machine=here)).seconds,
            measured=found[ranks].step,
            median=found[ranks].median_step,
        )
        for ranks, setting in settings.items()
    ]


def _probe(dataset: Dataset, run: RunConfig, plan: ShardingPlan) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        return run_probe(
            ProbeTask(
                folder=Path(folder),
                dataset=dataset.folder.resolve(),
                run=run,
                plan=plan if plan.ranks > 1 else None,
                ranks=plan.ranks,
                # What is fitted: one rank, as many as have cores of their own, and two in any case, for their link.
                steps_only=plan.ranks > max(2, count_cores()),
            )
        )


def _overhead(
    configs: Sequence[TableConfig],
    dense: DenseCost,
    plan: ShardingPlan,
    setting: Setting,
    machine: Machine,
    alone: Findings,
) -> float:
    """Return what a step takes beside bytes and arithmetic, from one with next to no samples."""
    usage = replace(setting.usage, global_batch_size=TINY_BATCH)
    free = replace(machine, seconds_per_step=0.0)
    explained = foresee(configs, plan, dense, replace(setting, usage=usage, machine=free)).seconds
    return max(alone.tiny_step - explained, 0.0)


def describe_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Return a line per number of ranks: foreseen, measured and the error."""
    rows = [("ranks here", "foreseen", "measured", "error", "median")]
    rows += [
        (
            str(c.ranks),
            format_milliseconds(c.foreseen),
            format_milliseconds(c.measured),
            f"{c.error:+.1%}",
            format_milliseconds(c.median),
        )
        for c in comparisons
    ]
    return f"{align(rows, right=range(5))}\n{explain_comparisons(comparisons)}"


def explain_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Say how it was measured, and whether others used the machine meanwhile."""
    cores = count_of(count_cores(), "core")
    words = f"One thread per rank, {cores}, batches in memory; measured: the fastest quarter of the steps."
    if max((c.median / c.measured for c in comparisons), default=1.0) > BUSY:
        words += " The median step took far longer: others used this machine, so measure again when it is idle."
    return words
