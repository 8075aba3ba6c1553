"""Curvature over ranks: Hessian products are those of the global batch, and every rank finds the same eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm.analysis.curvature.lanczos import lanczos, random_start
from dlrm.analysis.curvature.objective import Objective
from dlrm.analysis.curvature.rate import SlqLrLearner
from dlrm.analysis.curvature.rate_config import CurvatureRateConfig
from dlrm.distributed.ranks import ALONE, Ranks
from dlrm.training.attachments import Moment


class Dense(nn.Module):
    """A dense part: numbers [B, 3] and pooled rows [B, 4] to logits [B]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.last = nn.Parameter(torch.randn(5, generator=generator))

    def forward(self, numbers: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.cat([numbers, pooled], dim=1) @ self.first) @ self.last


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = Dense().double()

    def forward(self, part: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(self.dense(part[0], part[1]), part[2])


class Lookup(nn.Module):
    def forward(self, pooled: torch.Tensor) -> KeyedTensor:
        return KeyedTensor(keys=["a"], length_per_key=[4], values=pooled)


def columns() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    numbers, pooled = torch.randn(20, 3, generator=generator), torch.randn(20, 4, generator=generator)
    return numbers, pooled, (numbers[:, 0] > 0).float()


def measure_twice(rank: int, count: int) -> list[dict[str, list[float]]]:
    """Give what this rank finds with 13 or 7 of 20 samples, and where rank 1 has none."""
    ranks = Ranks(rank=rank, count=count)
    return [measure(*shares[rank], ranks) for shares in ([(0, 13), (13, 20)], [(0, 20), (20, 20)])]


def measure(first: int, last: int, ranks: Ranks) -> dict[str, list[float]]:
    own = tuple(column[first:last] for column in columns())
    objective = Objective(Loss(), [(tuple(c.double() for c in own), last - first)] if last > first else [], ranks=ranks)
    at = objective.weights()
    start = random_start(len(at), 3, at)
    values = lanczos(lambda vector: objective.hessian_product(at, vector), start, 12).values
    value, gradient = objective.gradient(at)
    model = nn.Module()
    model.tables, model.dense = Lookup(), Dense()
    config = CurvatureRateConfig(every_samples=20)
    learner = SlqLrLearner(config, model, torch.optim.SGD(model.parameters(), lr=0.1), ranks)
    moment = Moment(Rows(own[0], own[2]), 0, 20, 20)
    learner.before_step(moment)
    model.tables(own[1])
    learner.after_backward(moment)
    return {
        "product": objective.hessian_product(at, start).tolist(),
        "values": values.tolist(),
        "gradient": [value, objective.value(at), *gradient.tolist()],
        "learned": [learner.largest, learner.smallest, learner.factor("dense")],
    }


class Rows:
    """As much of a batch as is asked for."""

    def __init__(self, dense: torch.Tensor, labels: torch.Tensor) -> None:
        self.dense, self.labels = dense, labels

    def __len__(self) -> int:
        return len(self.labels)


def test_ranks_find_together_what_one_finds_alone_and_one_may_have_no_samples(run_ranks) -> None:
    alone = measure(0, 20, ALONE)
    assert alone["learned"][0] > alone["learned"][1] > 0
    results = run_ranks(measure_twice, 2)
    assert results[0] == results[1]  # to the last bit: ranks decide alike when to stop
    for result in results[0]:
        for name, numbers in alone.items():
            assert result[name] == pytest.approx(numbers, rel=1e-9, abs=1e-12), name
