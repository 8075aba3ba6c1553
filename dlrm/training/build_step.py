"""Puts a run's step together: the task, the dense optimizer's learning rates, who takes part, sums over ranks."""

from __future__ import annotations

from dlrm.distributed.parallelize import DenseReducer, copy_from_first
from dlrm.optim.scaling import follow_batch_size
from dlrm.optim.steering import Schedules, Steering
from dlrm.training.attach import attach
from dlrm.training.guards import find_tables
from dlrm.training.run_parts import RunParts
from dlrm.training.train_step import TrainStep
from embeddings.stopwatch import Stopwatch


def build_step(run: RunParts, stopwatch: Stopwatch) -> TrainStep:
    """Make the step of a run, and all ranks' dense weights those of rank 0 (a collective call)."""
    config, model = run.config, run.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copy_from_first([*model.parameters(), *model.buffers()], run.ranks)
    return TrainStep(
        run.problem.task(model, config, run.ranks),
        run.optimizer,
        steering=Steering(
            run.optimizer,
            find_tables(model),
            Schedules(
                dense=config.dense_schedule,
                head=config.head_schedule,
                tables=config.tables_schedule,
                small_tables=config.small_tables_schedule,
            ),
            rule=follow_batch_size(config),
        ),
        attachments=attach(run),
        precision=config.step.precision,
        stopwatch=stopwatch,
        numeric_names=run.problem.numeric_names,
        reducer=DenseReducer(trained, run.ranks) if run.ranks.count > 1 else None,
    )
