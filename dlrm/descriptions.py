"""Describes the tables of a recipe, without torch: what is only planned need not wait for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from dlrm.config import SmallTablesConfig, TablesConfig
from dlrm.tables_config import parse_rates
from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig

if TYPE_CHECKING:
    from dlrm.data.dataset import FeatureInfo


class Described(Protocol):
    """The description of prepared data."""

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """What tables look up."""


def describe_tables(
    info: Described, dim: int, tables: TablesConfig, small_tables: SmallTablesConfig | None = None
) -> list[TableConfig]:
    """Describe one table per feature of a dataset: all alike, or large ones and small ones.

    Raises:
        ValueError: A rate was given for a table which there is not.
    """
    small = small_tables or SmallTablesConfig()
    groups = {"tables": tables, "small_tables": small.resolve(tables)}
    optimizers = {group: describe_row_optimizer(config) for group, config in groups.items()}
    factors = parse_rates(tables.rates)
    if unknown := factors.keys() - {feature.name for feature in info.features}:
        known = ", ".join(feature.name for feature in info.features)
        raise ValueError(f"--tables.rates: expected names of tables ({known}), got {min(unknown)}")
    described = []
    for feature in info.features:
        group = "small_tables" if feature.num_rows < small.below_rows else "tables"
        config, optimizer = groups[group], optimizers[group]
        if feature.name in factors:
            optimizer = replace(optimizer, learning_rate=optimizer.learning_rate * factors[feature.name])
        described.append(
            TableConfig(
                name=feature.name,
                num_rows=feature.num_rows,
                dim=dim,
                pooling=config.pooling,
                optimizer=optimizer,
                init_scale=config.init_scale,
                row_type=config.row_type,
                memory=config.memory,
                group=group,
            )
        )
    return described


def describe_row_optimizer(config: TablesConfig) -> RowOptimizer:
    """Describe the optimizer that a recipe's tables have in common."""
    options = ("learning_rate", "weight_decay", "eps", "betas", "trust", "clip", "zeta", "l2", "l2_mode")
    given: dict[str, Any] = {name: value for name in options if (value := getattr(config, name)) is not None}
    if config.optimizer == "cowclip":
        del given["weight_decay"]  # which is 0: its decay is l2
        return RowCowClip(**given)
    if config.optimizer in ("lamb", "partial_lamb"):
        return RowLamb(partial=config.optimizer == "partial_lamb", **given)
    kinds = {"sgd": RowSGD, "adagrad": RowAdagrad, "adam": RowAdam, "rowwise_adagrad": RowWiseAdagrad}
    described: RowOptimizer = kinds[config.optimizer](**given)
    return described
