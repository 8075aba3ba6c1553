"""The dense part's exchanges: nothing that is lost changes a weight, and what cannot be is said in one line."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from dlrm.asynchronous.dense_average_config import DenseAverageConfig
from dlrm.asynchronous.flat_weights import FlatWeights
from dlrm.optim.config import DenseOptimizerConfig
from dlrm.optim.lamb import Lamb
from dlrm.training.attachments import Moment
from parameter_server.errors import LaneLostError, ShardUnreachableError

MOMENT = Moment(None, 0, 1, 1)  # type: ignore[arg-type]


def test_faults_of_a_connection_change_no_weight(serve: Any, network: Any, batches: Any, step: Any) -> None:
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
    serve: Any, monkeypatch: pytest.MonkeyPatch, network: Any, batches: Any, step: Any
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
    assert "dense part, shard 0 at local:0: expected success within 1 s, got " in str(caught[0])
    assert average.exchanges == 0
    assert "\n" not in str(caught[0])
    assert len(servers.said) == 1
    assert "which is tried again" in servers.said[0]


def test_a_step_does_not_wait_for_an_exchange(serve: Any, network: Any, batches: Any, step: Any) -> None:
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


def test_a_lane_that_is_lost_ends_the_run_with_a_line(serve: Any, network: Any, batches: Any, step: Any) -> None:
    servers, model = serve("easgd", count=1), network()
    servers.faults = iter(["", "lease lost"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = servers.average(model, optimizer, every_steps=1, background=False)
    with pytest.raises(LaneLostError, match="dense part: lane 64: expected lease 2 or a later one, got 1"):
        step(model, optimizer, batches(0, 1)[0], average)


def test_a_model_unlike_the_others_is_refused(serve: Any, network: Any) -> None:
    servers, model, other = serve("easgd"), network(), network(norm=True)
    servers.average(model, torch.optim.SGD(model.parameters(), lr=0.05)).before_step(MOMENT)
    average = servers.average(other, torch.optim.SGD(other.parameters(), lr=0.05))
    with pytest.raises(ValueError, match=r"expected a model of .* numbers, as the others', got one of"):
        average.before_step(MOMENT)


def test_what_servers_cannot_do_is_refused(serve: Any, network: Any, batches: Any, step: Any) -> None:
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
