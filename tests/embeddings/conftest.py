"""Batches to look up, and tables in float64 written the plain way to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowSGD, TableConfig

Bags = dict[str, list[list[int]]]  # feature -> bag -> ids


@dataclass
class PlainTables:
    """`nn.functional.embedding_bag` in float64, and the row optimizers written as their docstrings say."""

    configs: Sequence[TableConfig]
    weights: list[Tensor]
    states: list[Tensor]

    def look_up(self, bags: Bags) -> Tensor:
        for weight in self.weights:
            weight.requires_grad_(True).grad = None
        columns = []
        for config, weight in zip(self.configs, self.weights, strict=True):
            for feature in config.features:
                ids = torch.tensor([i for bag in bags[feature] for i in bag], dtype=torch.int64)
                offsets = torch.tensor([0, *(len(bag) for bag in bags[feature])]).cumsum(0)[:-1]
                columns.append(nn.functional.embedding_bag(ids, weight, offsets, mode=config.pooling))
        return torch.cat(columns, dim=1)

    @torch.no_grad()
    def update(self, bags: Bags, factor: float = 1.0) -> None:
        for config, weight, state in zip(self.configs, self.weights, self.states, strict=True):
            rows = sorted({i for feature in config.features for bag in bags[feature] for i in bag})
            if not rows:
                continue
            g = weight.grad[rows] + config.optimizer.weight_decay * weight[rows]
            rate = config.optimizer.learning_rate * factor
            if isinstance(config.optimizer, RowSGD):
                weight[rows] -= rate * g
            else:
                state[rows] += g.pow(2).mean(dim=1)
                weight[rows] -= rate * g / (state[rows].sqrt()[:, None] + config.optimizer.eps)


@pytest.fixture
def plain_tables() -> Callable[..., PlainTables]:
    """Makes float64 tables that start with the rows of others."""

    def make(tables: nn.Module) -> PlainTables:
        rows = list(tables.rows())
        return PlainTables(
            [row.config for row in rows],
            [row.weight.cpu().double().clone() for row in rows],
            [torch.zeros(row.config.num_rows, dtype=torch.float64) for row in rows],
        )

    return make


@pytest.fixture
def draw_bags() -> Callable[..., Bags]:
    """Draws bags of 0 to `longest` ids, few enough distinct ones that they repeat within and across bags."""

    def draw(configs: Sequence[TableConfig], *, batch_size: int, longest: int, random: np.random.Generator) -> Bags:
        return {
            feature: [
                random.integers(0, config.num_rows, random.integers(0, longest + 1)).tolist() for _ in range(batch_size)
            ]
            for config in configs
            for feature in config.features
        }

    return draw


@pytest.fixture
def keyed_jagged() -> Callable[..., KeyedJaggedTensor]:
    """Makes the batch that tables take of bags."""

    def make(bags: Bags, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
        flat = [bag for feature in bags.values() for bag in feature]
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.tensor([i for bag in flat for i in bag], dtype=dtype),
            lengths=torch.tensor(
                [len(bag) for bag in flat], dtype=torch.int32 if dtype == torch.int32 else torch.int64
            ),
        )

    return make
