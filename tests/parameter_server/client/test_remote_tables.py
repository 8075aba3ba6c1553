"""Tables on shards train as tables in this process do, bit for bit where there is one trainer in lock step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings import RowAdagrad, RowAdam, RowCowClip, RowLamb, RowOptimizer, RowSGD, RowWiseAdagrad, TableConfig
from embeddings.build import build_tables
from parameter_server.client.remote_rows import PushPlace
from parameter_server.client.remote_storage import RemoteStorage
from parameter_server.client.remote_tables import RemoteTables
from parameter_server.client.rows_client import LaneLease, RowsClient
from parameter_server.control.routes_source import FixedRoutes
from parameter_server.description import RunDescription
from parameter_server.partition import Routes, spread_evenly
from parameter_server.shard.shard import Shard
from parameter_server.transports import LocalConnection

SEED = 5
LANE = LaneLease(0, 1)
FEATURES = ("a", "a2", "b", "c")
OPTIMIZERS: list[RowOptimizer] = [
    RowWiseAdagrad(learning_rate=0.1),
    RowAdagrad(learning_rate=0.1, weight_decay=0.01),
    RowAdam(learning_rate=0.1, weight_decay=0.01),
    RowLamb(learning_rate=0.1, weight_decay=0.01),
    RowLamb(learning_rate=0.1, partial=True),
    RowSGD(learning_rate=0.1),
    RowCowClip(learning_rate=0.1, clip=0.05, l2=0.01, l2_mode="lazy"),  # ids that come again may be clipped less
]


def describe(
    optimizer: RowOptimizer = OPTIMIZERS[0], *, staleness: int | None = 0, num_rows: int = 40
) -> RunDescription:
    tables = (
        TableConfig(name="a", num_rows=num_rows, dim=16, features=("a", "a2"), optimizer=optimizer, init_scale=0.1),
        TableConfig(name="b", num_rows=6, dim=5, pooling="mean", optimizer=optimizer),
        TableConfig(name="c", num_rows=3000, dim=16, pooling="mean", optimizer=optimizer),
    )
    return RunDescription(run_id=9, seed=SEED, tables=tables, staleness=staleness, durability="none")


def draw_batch(random: np.random.Generator, *, weighted: bool = False, batch_size: int = 12) -> KeyedJaggedTensor:
    """Draws bags of 0 to 3 ids; those of the last table are far between, so that each step brings new ones."""
    lengths = random.integers(0, 4, (len(FEATURES), batch_size))
    counts = lengths.sum(axis=1)
    ids = [random.integers(0, most, n) for most, n in zip((40, 40, 6, 3000), counts, strict=True)]
    return KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.from_numpy(np.concatenate(ids)),
        lengths=torch.from_numpy(lengths.reshape(-1)),
        weights=torch.from_numpy(random.normal(1, 1, counts.sum()).astype(np.float32)) if weighted else None,
    )


@dataclass(kw_only=True)
class Run:
    """Two shards with rows of a run, and tables on them."""

    tables: RemoteTables
    shards: list[Shard]
    storage: RemoteStorage


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    """Starts two shards, within the process or behind gRPC on Unix sockets, and tables on them."""
    with ExitStack() as stack:

        def begin(description: RunDescription, sockets: Path | None = None, deadline_seconds: float = 30) -> Run:
            shards = [stack.enter_context(closing(Shard(description, number))) for number in range(2)]
            addresses = {n: f"local:{n}" if sockets is None else f"unix:{sockets / str(n)}" for n in range(2)}
            routes = Routes(epoch=1, owners=spread_evenly(range(2)), addresses=addresses)
            for shard in shards:
                shard.set_routes(routes)
            if sockets is not None:
                serve(stack, shards, addresses)

            def connect(address: str) -> Any:
                from parameter_server.transports import GrpcConnection

                return LocalConnection(shards[int(address[-1])]) if sockets is None else GrpcConnection(address)

            source = FixedRoutes(routes)
            rows = stack.enter_context(
                closing(RowsClient(description, source, connect, deadline_seconds=deadline_seconds))
            )
            storage = stack.enter_context(closing(RemoteStorage(description, source, connect)))
            return Run(tables=RemoteTables(description, rows, storage=storage), shards=shards, storage=storage)

        yield begin


def stop(server: Any) -> None:
    server.stop(None).wait()


def serve(stack: ExitStack, shards: Sequence[Shard], addresses: dict[int, str]) -> None:
    from parameter_server.processes.rows_service import add_rows_service, make_server

    for number, shard in enumerate(shards):
        server = make_server()
        add_rows_service(server, shard)
        assert server.add_insecure_port(addresses[number])
        server.start()
        stack.callback(stop, server)


def loss_of(pooled: Tensor, target: Tensor) -> Tensor:
    return ((pooled @ target) ** 2).mean()


def train_alike(
    remote: RemoteTables, steps: int, *, weighted: bool = False, batch_size: int = 12, lanes: int = 1
) -> Any:
    """Trains tables on shards and tables here on the same batches, and compares look-ups; returns the latter."""
    local = build_tables(remote.table_configs, seed=SEED)
    random = np.random.default_rng(1)
    target = torch.randn(sum(local.feature_dims), 3)
    batches = [draw_batch(random, weighted=weighted, batch_size=batch_size) for _ in range(steps)]
    for step, batch in enumerate(batches):
        for tables in (local, remote):
            tables.set_learning_rate_factors([1 + step / 10, 0.5, 1 / (step + 1)])
            tables.set_eps_factor(1 + step)
        remote.enter(batch, PushPlace(LaneLease(step % lanes, 1), step // lanes + 1))
        expected, pooled = local(batch).values(), remote(batch).values()
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
        if step + 1 < steps:
            remote.prefetch(batches[step + 1])
        loss_of(expected, target).backward()
        loss_of(pooled, target).backward()
    return local


def assert_same_rows(run: Run, local: Any) -> None:
    for far, rows in zip(run.tables.far_tables(), local.rows(), strict=True):
        found = far.read(0, rows.config.num_rows) | far.read_counters()
        for name, expected in {"weight": rows.weight, **rows.state}.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__ + str(getattr(o, "partial", "")))
def test_in_lock_step_one_trainer_equals_tables_in_this_process(
    start: Callable[..., Run], optimizer: RowOptimizer, weighted: bool
) -> None:
    run = start(describe(optimizer))
    local = train_alike(run.tables, 20, weighted=weighted)
    assert_same_rows(run, local)
    assert all(sum(shard.num_rows) for shard in run.shards)


def test_updates_count_also_on_shards_that_have_no_rows_of_some_batches(start: Callable[..., Run]) -> None:
    run = start(describe(RowAdam(learning_rate=0.1)))
    local = train_alike(run.tables, 40, batch_size=1, lanes=7)
    assert_same_rows(run, local)


def test_in_lock_step_over_sockets_as_well(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(describe(RowAdam(learning_rate=0.1)), sockets=tmp_path)
    local = train_alike(run.tables, 20, weighted=True)
    assert_same_rows(run, local)


@pytest.mark.parametrize("staleness", [None, 0])
def test_a_batch_that_is_looked_up_again_sees_what_it_has_changed(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, staleness: int | None
) -> None:
    push = Shard.push
    monkeypatch.setattr(Shard, "push", lambda *told: (time.sleep(0.1), push(*told))[1])
    run = start(describe(RowAdam(learning_rate=0.1), staleness=staleness))
    local, target = build_tables(run.tables.table_configs, seed=SEED), torch.randn(sum(run.tables.feature_dims), 3)
    batch = draw_batch(np.random.default_rng(1))
    run.tables.enter(batch, PushPlace(LANE, 1), PushPlace(LANE, 2))
    for _ in range(2):
        expected, pooled = local(batch).values(), run.tables(batch).values()
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
        loss_of(expected, target).backward()
        loss_of(pooled, target).backward()
    with torch.no_grad():
        torch.testing.assert_close(run.tables(batch).values(), local(batch).values(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected enter"):
        run.tables(batch)


def test_an_evaluation_pulls_and_creates_nothing(start: Callable[..., Run]) -> None:
    run = start(describe())
    batch = draw_batch(np.random.default_rng(0))
    expected = build_tables(run.tables.table_configs, seed=SEED)(batch).values()
    run.tables.eval()
    assert torch.equal(run.tables(batch).values(), expected)
    run.tables.train()
    with torch.no_grad():
        assert torch.equal(run.tables(batch).values(), expected)
    assert sum(map(sum, (shard.num_rows for shard in run.shards))) == 0


def test_shards_that_are_gone_are_named_also_from_backward(start: Callable[..., Run]) -> None:
    run = start(describe(RowSGD(learning_rate=0.1)), deadline_seconds=0.5)
    batch = draw_batch(np.random.default_rng(0))
    run.tables.enter(batch, PushPlace(LANE, 1))
    pooled = run.tables(batch).values().sum()
    for shard in run.shards:
        shard.close()
    with pytest.raises(Exception, match="shard"):
        pooled.backward()


def test_a_push_that_has_failed_is_told_at_close_and_only_once(start: Callable[..., Run]) -> None:
    run = start(describe(RowSGD(learning_rate=0.1)), deadline_seconds=0.5)
    batch = draw_batch(np.random.default_rng(0))
    run.tables.enter(batch, PushPlace(LANE, 1))
    pooled = run.tables(batch).values().sum()
    for shard in run.shards:
        shard.close()
    with suppress(Exception):  # told here already, where it is known by then
        pooled.backward()
    with pytest.raises(Exception, match="shard"):
        run.tables.close()
    run.tables.close()
