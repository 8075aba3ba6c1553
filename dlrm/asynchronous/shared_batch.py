"""Rows' rates for a trainer that takes a part of the run's batch at a time: its gradients are that much larger."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from typing_extensions import override

from dlrm.asynchronous.config import ServedConfig
from dlrm.optim.scaling import list_groups, rule_of
from dlrm.training.attachments import Attachment
from dlrm.training.guards import find_tables


class SharedBatch(Attachment):
    """Takes the tables' numbers, which were chosen for the whole batch, to a trainer's part of it.

    A gradient of the mean over a quarter of the batch is four times as large. Rows' rates and eps follow the run's rule
    for batch sizes, or `auto` where none was asked for: otherwise rows take steps at the start that no later one makes
    up for. The dense part keeps its rate: copies are averaged, and their mean has the noise of the whole batch.

    Args:
        model: with its tables.
        config: of the trainer.
    """

    name = "shared_batch"

    def __init__(self, model: nn.Module, config: ServedConfig) -> None:
        ratio = config.trainer_batch_size / config.step.global_batch_size
        ruled = config if config.rule is not None or config.rules else replace(config, rule="auto", scale_from=1)
        groups = [group for group in list_groups(config) if group.is_table]
        multipliers = {group.name: rule_of(ruled, group.name).multipliers(ratio, group) for group in groups}
        self._factors = {name: each.learning_rate for name, each in multipliers.items()}
        for tables in find_tables(model):
            tables.set_eps_factor(multipliers["tables"].eps)

    @override
    def factor(self, group: str) -> float:
        return self._factors.get(group, 1.0)
