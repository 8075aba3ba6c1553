"""What tests of the dense part share: shards in this process, lines that fail to them, and a model that learns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dlrm.asynchronous.dense_average import DenseAverage
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.ghost_batch_norm import GhostBatchNorm
from dlrm.training.attachments import Moment
from embeddings import RowSGD, TableConfig
from parameter_server.client.dense_client import DenseClient
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError
from parameter_server.partition import Routes, spread_evenly
from parameter_server.shard.dense_update import OPTIONS
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

TABLE = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))
MOMENT = Moment(None, 0, 1, 1)  # type: ignore[arg-type]


class Lane(NamedTuple):
    lane: int
    lease: int = 1
    next_clock: int = 1


class Line:
    """A connection that loses calls, or their answers, as a list says."""

    def __init__(self, shard: Shard, faults: Iterator[Any]) -> None:
        self.inner, self.faults = LocalConnection(shard), faults

    def push_pull_dense(self, message: bytes) -> Future[bytes]:
        fault = next(self.faults, "")
        if not fault:
            return self.inner.push_pull_dense(message)
        if isinstance(fault, threading.Event):  # until it is set
            fault.wait(20)
            return self.inner.push_pull_dense(message)
        if fault == "answer lost":
            self.inner.push_pull_dense(message).result()
        answer: Future[bytes] = Future()
        answer.set_exception(
            RefusedError(Refusal.FAILED_PRECONDITION, "lane 64: expected lease 2 or a later one, got 1")
            if fault == "lease lost"
            else ConnectionLost("reset")
        )
        return answer

    pull = push = push_pull_dense

    def close(self) -> None:
        self.inner.close()


class Servers:
    """Shards in this process, and the trainers around them."""

    def __init__(self, mode: str, count: int = 2, options: dict[str, Any] | None = None) -> None:
        settings = {OPTIONS: options} if options else {}
        description = RunDescription(run_id=3, seed=0, tables=(TABLE,), dense=mode, settings=settings)  # type: ignore[arg-type]
        self.mode = mode
        self.shards = [Shard(description, number) for number in range(count)]
        addresses = {number: f"local:{number}" for number in range(count)}
        self.routes = Routes(epoch=1, owners=spread_evenly(range(count)), addresses=addresses)
        for shard in self.shards:
            shard.set_routes(self.routes)
        self.faults: Iterator[Any] = iter(())
        self.said: list[str] = []
        self.averages: list[DenseAverage] = []

    def current(self) -> Routes:
        return self.routes

    def newer_than(self, epoch: int) -> Routes:
        return self.routes

    def connect(self, address: str) -> Line:
        return Line(self.shards[int(address.removeprefix("local:"))], self.faults)

    def average(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        trainers: int = 1,
        deadline_seconds: float = 20.0,
        place: Any = None,
        ends_chunk: Any = None,
        **config: Any,
    ) -> DenseAverage:
        client = DenseClient(3, self, self.connect, deadline_seconds=deadline_seconds, say=self.said.append)
        average = DenseAverage(
            model,
            optimizer,
            client,
            DenseAverageConfig(mode=self.mode, **config),  # type: ignore[arg-type]
            lane=Lane(64 + len(self.averages)),
            count_trainers=lambda: trainers,
            place=place,
            ends_chunk=ends_chunk,
        )
        self.averages.append(average)
        return average

    def close(self) -> None:
        for closable in (*self.averages, *self.shards):
            closable.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Servers]]:
    started: list[Servers] = []

    def start(*arguments: Any, **settings: Any) -> Servers:
        started.append(Servers(*arguments, **settings))
        return started[-1]

    yield start
    for servers in started:
        servers.close()


def _network(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    """A little more than a piece."""
    torch.manual_seed(seed)
    hidden = [GhostBatchNorm(200, ghost=8), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(90, 200), *hidden, nn.Linear(200, 1))


def _batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 90, generator=generator) for _ in range(count)]
    return [(batch, batch[:, :5].sum(1, keepdim=True)) for batch in inputs]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, average: DenseAverage | None = None) -> float:
    inputs, wanted = batch
    if average is not None:
        average.before_step(MOMENT)
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.mse_loss(model(inputs), wanted)
    loss.backward()
    if average is not None:
        average.after_backward(MOMENT)
    optimizer.step()
    if average is not None:
        average.after_step(MOMENT, loss.item())
    return loss.item()


@pytest.fixture
def network() -> Callable[..., nn.Sequential]:
    """Makes models that are alike for the same seed."""
    return _network


@pytest.fixture
def batches() -> Callable[..., list[tuple[Tensor, Tensor]]]:
    """Draws inputs and what is wanted of them."""
    return _batches


@pytest.fixture
def step() -> Callable[..., float]:
    """Trains on a batch, and tells the one who averages."""
    return _step
