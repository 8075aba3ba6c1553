"""Sets every learning rate before every step: base rate, schedules, the rule for the batch size, and who interferes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.optim import Optimizer

from dlrm.optim.lr_schedules import Schedule
from dlrm.optim.scaling_rules import GROUPS
from embeddings.interface import Tables

Factor = Callable[[str], float]
"""Given a group, what multiplies its learning rate."""
BatchFactor = Callable[[int, str], float]
"""Given the batch size in force and a group, what multiplies its learning rate."""


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Of the four groups; that of the head multiplies that of the dense part, and so with small tables and tables."""

    dense: Schedule = field(default_factory=Schedule)
    head: Schedule = field(default_factory=Schedule)
    tables: Schedule = field(default_factory=Schedule)
    small_tables: Schedule = field(default_factory=Schedule)

    def factor(self, group: str, samples: float) -> float:
        """Return a group's factor once so many samples have been seen."""
        if group in ("dense", "head"):
            return self.dense.factor(samples) * (self.head.factor(samples) if group == "head" else 1.0)
        return self.tables.factor(samples) * (self.small_tables.factor(samples) if group == "small_tables" else 1.0)


class Steering:
    """Sets the learning rates of a dense optimizer and of tables.

    A param group of the optimizer is of the group `head` if that is its `name`, and otherwise `dense`. A table is one
    of `small_tables` if that is its `group`, and otherwise one of `tables`.

    Args:
        dense_optimizer: its groups' rates now are the base rates.
        tables: whose base rates are in their configurations.
        schedules: of the groups.
        rule: for a batch size that changes; None leaves rates as they are.
    """

    def __init__(
        self,
        dense_optimizer: Optimizer,
        tables: Sequence[Tables],
        schedules: Schedules | None = None,
        *,
        rule: BatchFactor | None = None,
    ) -> None:
        self.schedules = schedules or Schedules()
        self._optimizer, self._tables, self._rule = dense_optimizer, tables, rule
        self._base_rates = [float(group["lr"]) for group in dense_optimizer.param_groups]
        self._table_groups = [
            ["small_tables" if config.group == "small_tables" else "tables" for config in held.table_configs]
            for held in tables
        ]
        self.factors = dict.fromkeys(GROUPS, 1.0)  # as they were set last

    def set(self, samples: float, batch_size: int, more: Factor | None = None) -> None:
        """Set all rates for a step.

        Args:
            samples: seen at the middle of its batch, see `Schedule.factor`.
            batch_size: in force.
            more: what else multiplies them.
        """
        for group in GROUPS:
            of_rule = 1.0 if self._rule is None else self._rule(batch_size, group)
            of_others = 1.0 if more is None else more(group)
            self.factors[group] = self.schedules.factor(group, samples) * of_rule * of_others
        for param_group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            param_group["lr"] = base * self.factors["head" if param_group.get("name") == "head" else "dense"]
        for held, groups in zip(self._tables, self._table_groups, strict=True):
            held.set_learning_rate_factors([self.factors[group] for group in groups])

    def values(self) -> dict[str, float]:
        """Return what was set last: the dense part's rate, and the factor on every table's own."""
        return {
            "dense_learning_rate": float(self._optimizer.param_groups[0]["lr"]),
            "tables_learning_rate_factor": self.factors["tables"],
        }
