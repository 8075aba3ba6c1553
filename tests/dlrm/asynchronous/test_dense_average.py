"""Trainers that share the dense part: one trains as if it were alone, several find together what each looks for."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlrm.asynchronous.dense_average import DenseAverage
from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.flat_weights import FlatWeights
from dlrm.ghost_batch_norm import GhostBatchNorm
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lamb import Lamb
from dlrm.training.attachments import Moment
from embeddings import RowSGD, TableConfig
from embeddings.build import build_tables
from parameter_server.client.dense_client import DenseClient, Place
from parameter_server.client.transports import LocalConnection
from parameter_server.dense_codec import PIECE
from parameter_server.description import RunDescription
from parameter_server.errors import ConnectionLost, Refusal, RefusedError, ShardUnreachableError
from parameter_server.partition import Routes, spread_evenly
from parameter_server.shard.dense_update import OPTIONS
from parameter_server.shard.shard import Shard

TABLE = TableConfig(name="a", num_rows=10, dim=4, optimizer=RowSGD(learning_rate=1.0))


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

    newer_than = None  # is never asked: routes do not change

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


MOMENT = Moment(None, 0, 1, 1)  # type: ignore[arg-type]


def network(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    """A little more than a piece."""
    torch.manual_seed(seed)
    hidden = [GhostBatchNorm(200, ghost=8), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(90, 200), *hidden, nn.Linear(200, 1))


def batches(seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 90, generator=generator) for _ in range(count)]
    return [(batch, batch[:, :5].sum(1, keepdim=True)) for batch in inputs]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, average: DenseAverage | None = None) -> float:
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


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, one), its in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, its, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


LOCAL: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.005, betas=(0.8, 0.99), weight_decay=0.01),
    "lamb": lambda p: Lamb(p, lr=0.01),
}
OF_SERVERS: dict[str, Any] = {"sgd": {"momentum": 0.9}, "adagrad": {}, "adam": {"betas": (0.8, 0.99)}}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", ["sgd", "adam", "lamb"])
def test_one_trainer_that_averages_trains_as_alone(
    serve: Callable[..., Servers], name: str, every: int, background: bool
) -> None:
    # Not with the others: they take steps in a direction of rounding errors where a norm leaves no gradient.
    alone, model = network(norm=name == "sgd"), network(norm=name == "sgd")
    optimizers = [LOCAL[name](each.parameters()) for each in (alone, model)]
    average = serve("average").average(model, optimizers[1], every_steps=every, background=background)
    for batch in batches(0, 20):
        step(alone, optimizers[0], batch)
        step(model, optimizers[1], batch, average)
    assert_alike(model, alone)
    average.before_measuring()
    assert_alike(model, alone)
    for (name, one), its in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, its, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam"])
def test_servers_that_update_train_as_the_trainer_alone_would(serve: Callable[..., Servers], name: str) -> None:
    alone, model = network(), network()
    optimizers = [LOCAL[name](each.parameters()) for each in (alone, model)]
    average = serve(name, options=OF_SERVERS[name]).average(model, optimizers[1], background=False)
    for at, batch in enumerate(batches(0, 20)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.5 if at == 10 else 1.0  # as a schedule does
        step(alone, optimizers[0], batch)
        step(model, optimizers[1], batch, average)
    assert_alike(model, alone)


def test_a_batch_that_another_trainer_computes_again_moves_the_master_once(serve: Callable[..., Servers]) -> None:
    servers, done = serve("sgd"), batches(0, 6)
    models = [network() for _ in range(2)]
    for model, lease, count in zip(models, (1, 2), (4, 6), strict=True):  # the second one begins the chunk again
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        clocks = itertools.count(1)
        place = lambda lease=lease, clocks=clocks: Place(5, lease, next(clocks))  # noqa: E731
        average = servers.average(model, optimizer, background=False, place=place)
        for batch in done[:count]:
            step(model, optimizer, batch, average)
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    for at, batch in enumerate(done):
        if at < 4:
            step(alone, optimizer, batch)
    # From there on gradients are of the second trainer's copy, which has followed the master.
    for batch in done[4:]:
        step(alone, optimizer, batch)
    assert_alike(models[1], alone)


def test_gradients_that_had_to_wait_are_sent_as_their_mean(serve: Callable[..., Servers]) -> None:
    alone, model = network(), network()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (alone, model)]
    average = serve("sgd").average(model, optimizers[1], every_steps=3, background=False)
    for three in (batches(0, 3), batches(1, 3)):
        step(alone, optimizers[0], tuple(torch.cat(each) for each in zip(*three, strict=True)))
        for batch in three:
            step(model, optimizers[1], batch, average)
    assert_alike(model, alone)


@pytest.mark.parametrize(("mode", "trainers"), [("easgd", 2), ("average", 2), ("easgd", 4)])
def test_trainers_find_the_optimum_of_a_convex_problem_together(
    serve: Callable[..., Servers], mode: str, trainers: int
) -> None:
    servers, wanted = serve(mode), torch.randn(50, generator=torch.Generator().manual_seed(9))
    scales = torch.logspace(0, -1.5, 50)
    models = []
    for seed in range(trainers):
        torch.manual_seed(seed)
        models.append(nn.Linear(50, 1, bias=False))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in models]
    averages = [
        servers.average(model, optimizer, trainers=trainers)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        for model, optimizer, average in zip(models, optimizers, averages, strict=True):
            average.before_step(MOMENT)
            # A quadratic whose gradients are noisy, as those of small batches are.
            noise = 0.3 * scales.sqrt() * torch.randn(50, generator=generator)
            model.weight.grad = (scales * (model.weight[0].detach() - wanted) + noise)[None]
            average.after_backward(MOMENT)
            optimizer.step()
            average.after_step(MOMENT, 0.0)
    own = torch.stack([model.weight[0].detach() for model in models])
    averages[0].before_measuring()
    master = models[0].weight[0].detach()
    excess = [float((scales * (x - wanted) ** 2).sum()) for x in (*own, master)]
    assert excess[-1] < 0.08 * float((scales * wanted**2).sum())
    assert excess[-1] < max(excess[:-1])  # the master wanders less
    assert averages[0].values()["dense_average/distance"] < 0.5
    assert 40 <= averages[0].exchanges <= 400 / 8 + 1


@pytest.mark.parametrize("mode", ["easgd", "average", "sgd"])
def test_two_trainers_in_threads_learn_one_model(serve: Callable[..., Servers], mode: str) -> None:
    servers = serve(mode)
    models = [network(0), network(1)]
    # Gradients that come late need smaller steps.
    rate = 0.05 if mode != "sgd" else 0.01
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model in models]
    averages = [
        servers.average(model, optimizer, trainers=2, every_steps=4 if mode != "sgd" else None)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    failed: list[BaseException] = []

    def train(index: int) -> None:
        try:
            for batch in batches(index, 150):
                step(models[index], optimizers[index], batch, averages[index])
            averages[index].exchange_now()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for average in averages:
        average.before_measuring()
    assert_alike(*models)  # both hold the master
    inputs, wanted = (torch.cat(each) for each in zip(*batches(7, 20), strict=True))
    with torch.no_grad():
        found, guess = nn.functional.mse_loss(models[0](inputs), wanted), wanted.var()
    assert found < 0.5 * guess


def test_a_trainer_that_joins_begins_with_the_master(serve: Callable[..., Servers]) -> None:
    servers, first, second = serve("easgd"), network(0), network(1)
    one = servers.average(first, torch.optim.SGD(first.parameters(), lr=0.05))
    one.before_step(MOMENT)
    other = servers.average(second, torch.optim.SGD(second.parameters(), lr=0.05))
    other.before_step(MOMENT)
    assert_alike(second, first)
    loaded = network(2)
    average = servers.average(loaded, torch.optim.SGD(loaded.parameters(), lr=0.05))
    average.assign()
    assert_alike(loaded, network(2))
    one.before_measuring()
    assert_alike(first, network(2))


def test_measured_is_the_master_and_trained_on_is_the_own_copy(serve: Callable[..., Servers]) -> None:
    servers, models = serve("easgd"), [network(0, norm=True), network(0, norm=True)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]
    averages = [
        servers.average(model, optimizer, trainers=2, every_steps=3, background=False)
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for index, (model, optimizer, average) in enumerate(zip(models, optimizers, averages, strict=True)):
        for batch in batches(index, 9):
            step(model, optimizer, batch, average)
    own = FlatWeights(models[0]).take()
    averages[0].before_measuring()
    master, exchanges = FlatWeights(models[0]).take(), averages[0].exchanges
    assert not np.allclose(own, master)
    averages[0].before_measuring()  # of the checkpoint that follows an evaluation
    averages[0].after_evaluation(None, 0)  # type: ignore[arg-type]
    assert averages[0].exchanges == exchanges
    assert np.array_equal(FlatWeights(models[0]).take(), master)
    averages[1].before_measuring()
    assert np.array_equal(FlatWeights(models[1]).take(), master)  # as it had nothing new
    assert isinstance(models[0][1], GhostBatchNorm)
    assert float(models[0][1].running_var.min()) > 0
    averages[0].before_step(MOMENT)
    assert np.array_equal(FlatWeights(models[0]).take(), own)


def test_a_model_goes_through_its_pieces_and_back() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict(
        {
            "tables": build_tables([TABLE], seed=0, device="cpu"),
            "first": shared,
            "again": shared,
            "short": nn.Linear(3, 5).bfloat16(),
            "norm": nn.BatchNorm1d(7),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    model["norm"].register_buffer("constant", torch.ones(9), persistent=False)
    model["norm"].num_batches_tracked.fill_(17)
    model["norm"].running_var.uniform_(1, 2)
    with torch.no_grad():
        model["first"].weight.t_()  # laid out otherwise in memory
    weights = FlatWeights(model)
    numbers = 64 * 64 + 64 + 15 + 5 + 14 + 6
    assert (weights.num_weight_pieces, weights.num_pieces) == (1, 2)
    assert weights.numbers == PIECE + 14
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pieces = weights.take()
    assert pieces.shape == (2, PIECE)
    assert not pieces[0, numbers:].any()
    assert not pieces[1, 14:].any()
    with torch.no_grad():
        for tensor in (*model.parameters(), model["norm"].running_mean, model["norm"].running_var):
            tensor.zero_()
    weights.put(pieces)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model["short"].weight.dtype == torch.bfloat16
    weights.add_to_weights(np.full((1, PIECE), 0.5, np.float32))
    torch.testing.assert_close(model["again"].bias, before["first.bias"] + 0.5)
    torch.testing.assert_close(model["short"].bias, before["short.bias"] + 0.5)
    torch.testing.assert_close(model["norm"].running_var, before["norm.running_var"])


def test_faults_of_a_connection_change_no_weight(serve: Callable[..., Servers]) -> None:
    results = []
    for faults in ([], ["", "lost", "answer lost", "", "answer lost", "answer lost", "lost"]):
        servers, model = serve("easgd"), network()
        servers.faults = iter(faults)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        average = servers.average(model, optimizer, every_steps=2, background=False)
        for batch in batches(0, 10):
            step(model, optimizer, batch, average)
        average.before_measuring()
        results.append(FlatWeights(model).take())
        assert (average.values()["dense_average/retries"] > 2) == bool(faults)
        assert not list(servers.faults)  # all of them happened
    assert np.array_equal(*results)


def test_training_goes_on_while_a_shard_is_away_and_ends_if_it_stays_away(
    serve: Callable[..., Servers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parameter_server.client.dense_client.SILENT_SECONDS", 0.1)
    servers, model = serve("easgd", count=1), network()
    servers.faults = itertools.chain([""], itertools.repeat("lost"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = servers.average(model, optimizer, every_steps=1, deadline_seconds=1.0)
    done = 0
    caught: list[ShardUnreachableError] = []
    while not caught:
        try:
            step(model, optimizer, batches(0, 1)[0], average)
            done += 1
        except ShardUnreachableError as error:
            caught.append(error)
    assert done > 5
    assert "dense part: expected an answer within 1 s, got none; shard 0" in str(caught[0])
    assert average.exchanges == 0
    assert "\n" not in str(caught[0])
    assert len(servers.said) == 1
    assert "which is tried again" in servers.said[0]


def test_a_step_does_not_wait_for_an_exchange(serve: Callable[..., Servers]) -> None:
    servers, model, released = serve("easgd", count=1), network(), threading.Event()
    servers.faults = iter(["", released])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = servers.average(model, optimizer, every_steps=2)
    began = time.perf_counter()
    for batch in batches(0, 5):
        step(model, optimizer, batch, average)
    assert time.perf_counter() - began < 15
    assert average.exchanges == 0
    released.set()
    average.exchange_now()
    assert average.exchanges == 2  # the second one when the first was answered, of all steps since


def test_a_lane_that_is_lost_ends_the_run_with_a_line(serve: Callable[..., Servers]) -> None:
    servers, model = serve("easgd", count=1), network()
    servers.faults = iter(["", "lease lost"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = servers.average(model, optimizer, every_steps=1, background=False)
    with pytest.raises(ValueError, match="expected lease 2 or a later one, got 1; start this trainer again"):
        step(model, optimizer, batches(0, 1)[0], average)


def test_a_model_unlike_the_others_is_refused(serve: Callable[..., Servers]) -> None:
    servers, model, other = serve("easgd"), network(), network(norm=True)
    servers.average(model, torch.optim.SGD(model.parameters(), lr=0.05)).before_step(MOMENT)
    average = servers.average(other, torch.optim.SGD(other.parameters(), lr=0.05))
    with pytest.raises(ValueError, match=r"expected a model of .* numbers, as the others', got one of"):
        average.before_step(MOMENT)


def test_what_servers_cannot_do_is_refused(serve: Callable[..., Servers]) -> None:
    model = network()
    lamb = Lamb(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"--dense.name lamb: expected adam .* lamb and others run on the trainers"):
        serve("adam").average(model, lamb)
    with pytest.raises(ValueError, match=r"--dense.name lamb: expected sgd"):
        DenseAverageConfig(mode="sgd").server_options(DenseOptimizerConfig(name="lamb"))
    config = DenseOptimizerConfig(name="adam", betas=(0.8, 0.9))
    assert DenseAverageConfig(mode="adam").server_options(config) == {"betas": (0.8, 0.9)}
    assert DenseAverageConfig().server_options(config) == {}
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[0].bias], "lr": 0.2}]
    rates = torch.optim.SGD(groups, lr=0.1)
    average = serve("sgd").average(model, rates)
    with pytest.raises(ValueError, match=r"--head.learning-rate: expected one learning rate .* got 0.1 and 0.2"):
        step(model, rates, batches(0, 1)[0], average)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "easgd", "alpha": 1.0},
            "--dense-average.alpha: expected a number in .0, 1., above which copies move apart, got 1.0",
        ),
        ({"mode": "easgd", "alpha": 1.7}, "--dense-average.alpha"),
        ({"mode": "easgd", "alpha": 0.0}, "--dense-average.alpha"),
        ({"beta": 1.0}, "--dense-average.beta"),
        ({"every_steps": 0}, "--dense-average.every-steps: expected at least 1, got 0"),
        ({"mode": "lamb"}, "--dense-average.mode: .* got 'lamb': servers update number by number; lamb and others run"),
        ({"mode": "average", "momentum": 1.0}, "--dense-average.momentum: expected a number in"),
        ({"mode": "easgd", "momentum": 0.5}, "--dense-average.momentum: expected --dense-average.mode average"),
        ({"mode": "sgd", "alpha": 0.5}, "--dense-average.alpha: expected --dense-average.mode easgd, got sgd"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseAverageConfig(**settings)


def test_the_force_gets_weaker_with_the_number_of_trainers() -> None:
    assert [DenseAverageConfig().alpha_for(n) for n in (1, 2, 3, 9)] == pytest.approx([0.5, 0.45, 0.3, 0.1])
    assert DenseAverageConfig(mode="easgd", alpha=0.2).alpha_for(50) == 0.2
    assert (DenseAverageConfig().steps, DenseAverageConfig(mode="adam").steps) == (8, 1)
