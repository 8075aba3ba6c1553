"""Batches to look up, and tables in float64 written the plain way to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowSGD, RowWiseAdagrad, TableConfig

Bags = dict[str, list[list[int]]]  # feature -> bag -> ids
Weights = dict[str, list[list[float]]]  # feature -> bag -> a weight for each id


@dataclass
class PlainTables:
    """Pooling in float64 with autograd's gradients, and the row optimizers written as their docstrings say."""

    configs: Sequence[TableConfig]
    weights: list[Tensor]
    states: list[dict[str, Tensor]] = field(default_factory=list)
    updates: int = 0

    def look_up(self, bags: Bags, bag_weights: Weights | None = None) -> Tensor:
        for weight in self.weights:
            weight.requires_grad_(True).grad = None
        columns = []
        for config, weight in zip(self.configs, self.weights, strict=True):
            for feature in config.features:
                pooled = []
                for b, bag in enumerate(bags[feature]):
                    rows = weight[torch.tensor(bag, dtype=torch.int64)]
                    if bag_weights is not None:
                        rows = rows * torch.tensor(bag_weights[feature][b], dtype=torch.float64)[:, None]
                    total = rows.sum(dim=0)
                    pooled.append(total / len(bag) if bag and config.pooling == "mean" else total)
                columns.append(torch.stack(pooled))
        return torch.cat(columns, dim=1)

    @torch.no_grad()
    def update(self, bags: Bags, factors: Sequence[float] | None = None) -> None:
        self.updates += 1
        factors = factors or [1.0] * len(self.configs)
        for config, weight, state, factor in zip(self.configs, self.weights, self.states, factors, strict=True):
            ids = Counter(i for feature in config.features for bag in bags[feature] for i in bag)
            rows = sorted(ids)
            if getattr(config.optimizer, "trust", "") == "table" or getattr(config.optimizer, "l2_mode", "") == "dense":
                rows = list(range(config.num_rows))
            if rows:
                gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight[rows] += self._step(config, weight[rows], gradient[rows], rows, state, factor, ids)

    def _step(
        self,
        config: TableConfig,
        w: Tensor,
        g: Tensor,
        rows: list[int],
        state: dict[str, Tensor],
        factor: float,
        ids: Counter[int],
    ) -> Tensor:
        optimizer = config.optimizer
        rate, decay = optimizer.learning_rate * factor, getattr(optimizer, "weight_decay", 0.0)
        if isinstance(optimizer, RowSGD):
            return -rate * (g + decay * w)
        if isinstance(optimizer, RowWiseAdagrad | RowAdagrad):
            g = g + decay * w
            squares = g**2 if isinstance(optimizer, RowAdagrad) else (g**2).mean(dim=1)
            state["sum_of_squares"][rows] += squares
            root = state["sum_of_squares"][rows].sqrt().reshape(len(rows), -1)
            return -rate * g / (root + optimizer.eps)
        if isinstance(optimizer, RowCowClip):
            g = self._clip(optimizer, w, g, rows, state, ids)
        beta1, beta2 = optimizer.betas
        m, v = state["first_moment"], state["second_moment"]
        squares = g**2 if v.dim() == 2 else (g**2).mean(dim=1)
        m[rows] = beta1 * m[rows] + (1 - beta1) * g
        v[rows] = beta2 * v[rows] + (1 - beta2) * squares
        m_hat, v_hat = m[rows] / (1 - beta1**self.updates), v[rows] / (1 - beta2**self.updates)
        u = m_hat / (v_hat.sqrt().reshape(len(rows), -1) + optimizer.eps) + decay * w
        if isinstance(optimizer, RowAdam | RowCowClip):
            return -rate * u
        lengths, steps = ((w**2).sum(1, keepdim=True), (u**2).sum(1, keepdim=True))
        if optimizer.trust != "row":
            lengths, steps = lengths.sum(), steps.sum()
        ratio = torch.where((lengths > 0) & (steps > 0), (lengths / steps).sqrt(), 1.0)
        return -rate * ratio * u

    def _clip(
        self, optimizer: RowCowClip, w: Tensor, g: Tensor, rows: list[int], state: dict[str, Tensor], ids: Counter[int]
    ) -> Tensor:
        gaps = torch.ones(len(rows), 1, dtype=torch.float64)
        if optimizer.l2_mode == "lazy":
            gaps = self.updates - state["last_update"][rows][:, None]
            state["last_update"][rows] = self.updates
        g = g + 2 * optimizer.l2 * gaps * w
        counts = torch.tensor([[max(1, ids[row])] for row in rows], dtype=torch.float64)
        least = optimizer.clip * w.shape[1] ** 0.5 * optimizer.zeta
        most = optimizer.clip * counts * w.norm(dim=1, keepdim=True).clamp(min=least)
        lengths = g.norm(dim=1, keepdim=True)
        return torch.where(lengths > most, g * most / lengths, g)


@pytest.fixture
def plain_tables() -> Callable[..., PlainTables]:
    """Makes float64 tables that start with the rows of others."""

    def make(tables: nn.Module) -> PlainTables:
        rows = list(tables.rows())
        return PlainTables(
            [row.config for row in rows],
            [row.weight.cpu().double().clone() for row in rows],
            [
                {name: tensor.cpu().double().clone() for name, tensor in row.state.items() if tensor.dim()}
                for row in rows
            ],
        )

    return make


@pytest.fixture
def assert_equals_plain() -> Callable[..., None]:
    """Compares tables' rows and states with those of plain ones."""

    def check(tables: nn.Module, plain: PlainTables, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        for row, weight, state in zip(tables.rows(), plain.weights, plain.states, strict=True):
            torch.testing.assert_close(row.weight.cpu().double(), weight.detach(), rtol=rtol, atol=atol)
            for name, tensor in row.state.items():
                expected = state[name] if tensor.dim() else torch.tensor(float(plain.updates), dtype=torch.float64)
                torch.testing.assert_close(tensor.cpu().double(), expected, rtol=rtol, atol=atol)

    return check


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
def draw_weights() -> Callable[..., Weights]:
    """Draws a weight for each id of bags, some of them negative."""

    def draw(bags: Bags, random: np.random.Generator) -> Weights:
        return {feature: [random.normal(1, 1, len(bag)).tolist() for bag in its] for feature, its in bags.items()}

    return draw


@pytest.fixture
def keyed_jagged() -> Callable[..., KeyedJaggedTensor]:
    """Makes the batch that tables take of bags."""

    def make(bags: Bags, dtype: torch.dtype = torch.int64, weights: Weights | None = None) -> KeyedJaggedTensor:
        flat = [bag for feature in bags.values() for bag in feature]
        weighted = [w for feature in (weights or {}).values() for bag in feature for w in bag]
        return KeyedJaggedTensor(
            keys=list(bags),
            values=torch.tensor([i for bag in flat for i in bag], dtype=dtype),
            lengths=torch.tensor(
                [len(bag) for bag in flat], dtype=torch.int32 if dtype == torch.int32 else torch.int64
            ),
            weights=None if weights is None else torch.tensor(weighted),
        )

    return make
