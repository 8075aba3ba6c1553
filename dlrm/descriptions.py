"""Describes the tables of a recipe, without torch: what is only planned need not wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlrm.config import TablesConfig
from embeddings import RowAdagrad, RowAdam, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig

if TYPE_CHECKING:
    from dlrm.data.dataset import DatasetInfo


def describe_tables(info: DatasetInfo, dim: int, config: TablesConfig) -> list[TableConfig]:
    """Describe one table per feature of a dataset, all alike."""
    optimizer = describe_row_optimizer(config)
    return [
        TableConfig(
            name=feature.name,
            num_rows=feature.num_rows,
            dim=dim,
            pooling=config.pooling,
            optimizer=optimizer,
            init_scale=config.init_scale,
            row_type=config.row_type,
            memory=config.memory,
        )
        for feature in info.features
    ]


def describe_row_optimizer(config: TablesConfig) -> RowOptimizer:
    """Describe the optimizer that a recipe's tables have in common."""
    common: dict[str, Any] = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return RowSGD(**common)
    if config.eps is not None:
        common["eps"] = config.eps
    if config.optimizer == "adagrad":
        return RowAdagrad(**common)
    if config.optimizer == "adam":
        return RowAdam(betas=config.betas, **common)
    if config.optimizer in ("lamb", "partial_lamb"):
        partial = config.optimizer == "partial_lamb"
        return RowLamb(betas=config.betas, partial=partial, trust=config.trust, **common)
    return RowWiseAdagrad(**common)
