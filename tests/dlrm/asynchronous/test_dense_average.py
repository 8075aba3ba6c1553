"""Trainers that share the dense part: one trains as if it were alone, several find together what each looks for."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlrm.asynchronous.dense_average import DenseAverage
from dlrm.asynchronous.flat_weights import FlatWeights
from dlrm.ghost_batch_norm import GhostBatchNorm
from dlrm.optim.lamb import Lamb
from dlrm.training.attachments import Moment
from parameter_server.client.dense_client import Place

MOMENT = Moment(None, 0, 1, 1)  # type: ignore[arg-type]


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, one), its in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, its, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def until_exchanged(average: DenseAverage, exchanges: int) -> None:
    """Waits for an exchange under way, and takes its answer over."""
    end = time.monotonic() + 20
    while average.exchanges < exchanges:
        assert time.monotonic() < end, "an exchange has no answer"
        average.before_step(MOMENT)
        time.sleep(0.001)


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
    serve: Any, name: str, every: int, background: bool, network: Any, batches: Any, step: Any
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
def test_servers_that_update_train_as_the_trainer_alone_would(
    serve: Any, name: str, network: Any, batches: Any, step: Any
) -> None:
    alone, model = network(), network()
    optimizers = [LOCAL[name](each.parameters()) for each in (alone, model)]
    average = serve(name, options=OF_SERVERS[name]).average(model, optimizers[1], background=False)
    for at, batch in enumerate(batches(0, 20)):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.5 if at == 10 else 1.0  # as a schedule does
        step(alone, optimizers[0], batch)
        step(model, optimizers[1], batch, average)
    assert_alike(model, alone)


def test_a_batch_that_another_trainer_computes_again_moves_the_master_once(
    serve: Any, network: Any, batches: Any, step: Any
) -> None:
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


def test_gradients_that_are_sent_together_are_the_same_whoever_trains_their_chunk(
    serve: Any, network: Any, batches: Any, step: Any
) -> None:
    servers, chunk = serve("sgd"), batches(0, 5)
    models = [network() for _ in range(2)]
    for model, lease, count in zip(models, (1, 2), (3, 5), strict=True):  # the second one begins the chunk again
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        clocks, steps = itertools.count(1), itertools.count(1)
        average = servers.average(
            model,
            optimizer,
            every_steps=2,
            background=False,
            place=lambda lease=lease, clocks=clocks: Place(5, lease, next(clocks)),
            ends_chunk=lambda steps=steps: next(steps) == 5,
        )
        for batch in chunk[:count]:
            step(model, optimizer, batch, average)
        average.before_measuring()  # by which no gradient leaves those that it is sent with
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    for together in (chunk[:2], chunk[2:4], chunk[4:]):
        step(alone, optimizer, tuple(torch.cat(each) for each in zip(*together, strict=True)))
    assert_alike(models[1], alone)


def test_gradients_that_had_to_wait_are_sent_as_their_mean(serve: Any, network: Any, batches: Any, step: Any) -> None:
    alone, model = network(), network()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (alone, model)]
    average = serve("sgd").average(model, optimizers[1], every_steps=3, background=False)
    for three in (batches(0, 3), batches(1, 3)):
        step(alone, optimizers[0], tuple(torch.cat(each) for each in zip(*three, strict=True)))
        for batch in three:
            step(model, optimizers[1], batch, average)
    assert_alike(model, alone)


@pytest.mark.parametrize(("mode", "trainers"), [("easgd", 2), ("average", 2), ("easgd", 4)])
def test_trainers_find_the_optimum_of_a_convex_problem_together(serve: Any, mode: str, trainers: int) -> None:
    servers, wanted = serve(mode), torch.randn(50, generator=torch.Generator().manual_seed(9))
    released = threading.Event()
    released.set()
    servers.faults = itertools.repeat(released)
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
    for at in range(400):
        if at % 8 == 3:  # answers come three steps late, all of them, whenever the background threads have time
            released.set()
            for average in averages:
                until_exchanged(average, at // 8)
            released.clear()
        for model, optimizer, average in zip(models, optimizers, averages, strict=True):
            average.before_step(MOMENT)
            # A quadratic whose gradients are noisy, as those of small batches are.
            noise = 0.3 * scales.sqrt() * torch.randn(50, generator=generator)
            model.weight.grad = (scales * (model.weight[0].detach() - wanted) + noise)[None]
            average.after_backward(MOMENT)
            optimizer.step()
            average.after_step(MOMENT, 0.0)
    own = torch.stack([model.weight[0].detach() for model in models])
    released.set()
    for average in averages:
        until_exchanged(average, 400 // 8)
    averages[0].before_measuring()
    master = models[0].weight[0].detach()
    excess = [float((scales * (x - wanted) ** 2).sum()) for x in (*own, master)]
    assert excess[-1] < 0.08 * float((scales * wanted**2).sum())
    assert excess[-1] < max(excess[:-1])  # the master wanders less
    assert averages[0].values()["dense_average/distance"] < 0.5
    assert 40 <= averages[0].exchanges <= 400 / 8 + 1


@pytest.mark.parametrize("mode", ["easgd", "average", "sgd"])
def test_two_trainers_in_threads_learn_one_model(serve: Any, mode: str, network: Any, batches: Any, step: Any) -> None:
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


def test_a_trainer_that_joins_begins_with_the_master(serve: Any, network: Any) -> None:
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


def test_measured_is_the_master_and_trained_on_is_the_own_copy(
    serve: Any, network: Any, batches: Any, step: Any
) -> None:
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
